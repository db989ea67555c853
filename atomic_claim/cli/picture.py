"""Both halves of the demo as a timeline: a lane a worker, a bar a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .workload import Half, Run

ONCE = "#3b78b0"
MORE_THAN_ONCE = "#d62728"
INCHES_WIDE = 10.0
INCHES_A_LANE = 0.3
DOTS_AN_INCH = 150
MOST_TICKS = 40
# A run shorter than this part of the width could not be seen.
LEAST_WIDTH = 1 / 1200
# More bars than these make an SVG that browsers are slow to show.
MOST_VECTORS = 20_000
# The keys are literals to Matplotlib 3.11 and strings to those before.
STYLE: Any = {
    # Ids in the SVG that are the same for the same picture.
    "svg.hashsalt": "atomic-claim",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "ytick.left": False,
}


def draw(path: Path, title: str, halves: Sequence[Half]) -> None:
    """Draw the halves one below the other, on the same scale, into an SVG or PNG file."""
    seconds = max(half.seconds for half in halves) or 1.0
    lanes = halves[0].workload.workers
    with rc_context(STYLE):
        height = 1.7 + len(halves) * (0.6 + INCHES_A_LANE * max(lanes, 2))
        figure = Figure(figsize=(INCHES_WIDE, height), layout="constrained", facecolor="white")
        figure.suptitle(f"{title}: {halves[0].workload}", fontsize=13, x=0.01, ha="left")
        panels = figure.subplots(len(halves), sharex=True, squeeze=False)[:, 0]
        for axes, half in zip(panels, halves, strict=True):
            _draw_half(axes, half, seconds)
        panels[-1].set_xlabel("time since all workers began (seconds)")
        figure.legend(
            handles=[
                Patch(color=ONCE, label="a run of a job that ran once"),
                Patch(color=MORE_THAN_ONCE, label="a run of a job that ran more than once"),
            ],
            loc="outside lower left",
            ncols=2,
            frameon=False,
        )
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else {}
        figure.savefig(path, dpi=DOTS_AN_INCH, metadata=metadata)


def _draw_half(axes: Axes, half: Half, seconds: float) -> None:
    lanes = half.workload.workers
    axes.set_title(_summary(half))
    axes.set_xlim(0, seconds * 1.005)
    axes.set_ylim(lanes - 0.5, -0.5)
    ticks = range(0, lanes, 1 + lanes // MOST_TICKS)
    axes.set_yticks(ticks, [str(lane + 1) for lane in ticks])
    axes.set_ylabel("worker")
    for lane in range(lanes):
        axes.axhspan(lane - 0.4, lane + 0.4, color="#f2f2f2", linewidth=0)
    doubled = half.doubled
    kinds = {
        ("once", ONCE): [run for run in half.runs if run.job not in doubled],
        ("more-than-once", MORE_THAN_ONCE): [run for run in half.runs if run.job in doubled],
    }
    for (kind, colour), runs in kinds.items():
        bars = PolyCollection(list(_bars(runs, seconds * LEAST_WIDTH)), facecolors=colour)
        bars.set_linewidth(0)
        # All are inside; an SVG would say at each where it is to be cut off.
        bars.set_clip_on(False)
        bars.set_gid(f"{half.name.replace(' ', '-')}-{kind}")
        bars.set_rasterized(len(runs) > MOST_VECTORS)
        axes.add_collection(bars, autolim=False)


def _summary(half: Half) -> str:
    doubled = len(half.doubled)
    return (
        f"{half.name}: {half.workload.jobs:,} jobs ran {len(half.runs):,} times, "
        f"{f'{doubled:,} of them' if doubled else 'none'} more than once"
        + (f", {half.lost:,} never" if half.lost else "")
    )


def _bars(runs: Iterable[Run], least: float) -> Iterable[list[tuple[float, float]]]:
    for run in runs:
        left, right = run.begin, max(run.end, run.begin + least)
        top, bottom = run.worker - 0.4, run.worker + 0.4
        yield [(left, top), (right, top), (right, bottom), (left, bottom)]
