"""The figures as a table and as a chart."""

import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import sqlalchemy as sa
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from tests.benchmarks.measuring import Line

REACHED = "#3b78b0"
MISSED = "#d62728"
UNASKED = "#8c8c8c"
COLOURS = {True: REACHED, False: MISSED, None: UNASKED}
MOST_BARS = 60
# The keys are literals to Matplotlib 3.11 and strings to those before.
VERDICTS = {True: "PASS", False: "MISS", None: ""}
# Where a guide holds the table of the figures.
MARKED = re.compile(r"(<!-- figures -->\n).*?(<!-- end of figures -->)", re.DOTALL)
STYLE: Any = {
    "svg.hashsalt": "atomic-claim",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def machine() -> str:
    """Describe the machine and the versions behind the figures."""
    return (
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python "
        f"{platform.python_version()}, SQLAlchemy {sa.__version__}"
    )


def quietness() -> str:
    """Describe whether the machine does nothing else, by its load of the last minute."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load <= cores / 4:
        return "The machine was quiet."
    return (
        f"The machine was busy before the first turn (load {load:.1f}, {cores} cores): run this "
        "again on a quiet one before you quote a ratio."
    )


def show(console: Console, title: str, lines: Sequence[Line]) -> None:
    """Print a table of the figures."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("measured")
    table.add_column("median", justify="right")
    table.add_column("against")
    for name in ("ratio", "spread", "target", ""):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("also seen")
    for line in lines:
        low, high = line.spread
        colour = {True: "green", False: "red", None: ""}[line.reached]
        ratio = f"{line.ratio:.2f}"
        table.add_row(
            line.name,
            _value(line),
            line.against,
            f"[{colour}]{ratio}[/]" if colour else ratio,
            f"{low:.2f}-{high:.2f}",
            target(line),
            VERDICTS[line.reached],
            line.note,
        )
    console.print(table)


def write(path: Path, title: str, lines: Sequence[Line]) -> None:
    """Write the figures that have a target as a table between the two marks of a guide.

    Raises:
        ValueError: the guide has no marks.
    """
    rows = [
        f"| {line.name} | {_value(line)} | {line.against} | {line.ratio:.2f} "
        f"| {line.spread[0]:.2f}-{line.spread[1]:.2f} | {target(line)} | {VERDICTS[line.reached]} |"
        for line in lines
        if line.reached is not None
    ]
    head = (
        "| measured | median | against | ratio | spread | target | |\n|---|--:|---|--:|--:|--:|---|"
    )
    section = "\n".join([title, "", head, *rows])
    text, found = MARKED.subn(
        lambda marks: f"{marks[1]}{section}\n{marks[2]}", path.read_text(encoding="utf-8")
    )
    if not found:
        raise ValueError(f"{path} has no line <!-- figures --> and <!-- end of figures -->")
    path.write_text(text, encoding="utf-8")


def _value(line: Line) -> str:
    return f"{line.value:,.{0 if line.value >= 100 else 2}f} {line.unit}"


def target(line: Line) -> str:
    """Format the target of a figure."""
    if line.least is not None:
        return f"≥ {line.least:g}" + (f" ({line.accepted:g})" if line.accepted else "")
    return "" if line.most is None else f"≤ {line.most:g}"


def draw(path: Path, title: str, lines: Sequence[Line]) -> None:
    """Draw each ratio as a bar with its spread, or as a cell of a table if there are many."""
    with rc_context(STYLE):
        figure = _bars(lines) if len(lines) <= MOST_BARS else _cells(lines)
        figure.suptitle(fill(title, 110), x=0.01, ha="left")
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else {}
        figure.savefig(path, dpi=150, metadata=metadata)


def _bars(lines: Sequence[Line]) -> Figure:
    """Draw each ratio as a bar with its spread, and its target as a stroke."""
    figure = Figure(figsize=(10, 1.2 + 0.24 * len(lines)), layout="constrained")
    axes = figure.subplots()
    for place, line in enumerate(lines):
        low, high = line.spread
        axes.barh(place, line.ratio, color=COLOURS[line.reached], height=0.7)
        axes.plot([low, high], [place, place], color="black", linewidth=1)
        wanted = line.least if line.least is not None else line.most
        if wanted is not None:
            axes.plot([wanted, wanted], [place - 0.45, place + 0.45], color="black")
    axes.set_yticks(
        range(len(lines)), [f"{line.figure}: {line.name} / {line.against}" for line in lines]
    )
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.axvline(1, color="#bbbbbb", linewidth=0.8, zorder=0)
    if max(line.spread[1] for line in lines) > 8 * min(line.ratio for line in lines):
        axes.set_xscale("log")
    axes.set_xlabel("ratio (median; the thin line is its spread, the upright one the target)")
    return figure


def _cells(lines: Sequence[Line]) -> Figure:
    """Write each ratio with its spread into a cell, by the two parts of its name."""
    rows = list(dict.fromkeys(line.name.partition(": ")[0] for line in lines))
    columns = list(dict.fromkeys(line.name.partition(": ")[2] for line in lines))
    figure = Figure(figsize=(3.5 + 1.15 * len(columns), 1.6 + 0.24 * len(rows)))
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    for line in lines:
        row, _, column = line.name.partition(": ")
        x, y = columns.index(column), rows.index(row)
        axes.barh(y, 0.96, left=x - 0.48, height=0.9, color=COLOURS[line.reached])
        low, high = line.spread
        said = f"{line.ratio:.2f} ({low:.2f}-{high:.2f})"
        axes.text(x, y, said, ha="center", va="center", color="white", fontsize=7)
    axes.set_xticks(range(len(columns)), [fill(each, 16) for each in columns])
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.xaxis.tick_top()
    axes.set_xlabel("ratio of the p50 to that without it, with its spread; red misses its target")
    return figure
