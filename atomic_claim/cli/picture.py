"""Results as a timeline: a lane a worker, a bar a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from atomic_claim.testing.results import Call, Counted, Key

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


def draw(path: Path, title: str, results: Sequence[Counted]) -> None:
    """Draw the results one below the other, on the same scale, into an SVG or PNG file."""
    seconds = max((call.end for found in results for call in found.calls), default=0.0) or 1.0
    lanes = results[0].workers
    with rc_context(STYLE):
        height = 1.7 + len(results) * (0.6 + INCHES_A_LANE * max(lanes, 2))
        figure = Figure(figsize=(INCHES_WIDE, height), layout="constrained", facecolor="white")
        figure.suptitle(f"{title}: {results[0].workload}", fontsize=13, x=0.01, ha="left")
        panels = figure.subplots(len(results), sharex=True, squeeze=False)[:, 0]
        for axes, found in zip(panels, results, strict=True):
            _draw_panel(axes, found, seconds)
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


def _draw_panel(axes: Axes, found: Counted, seconds: float) -> None:
    lanes = found.workers
    axes.set_title(_summary(found))
    axes.set_xlim(0, seconds * 1.005)
    axes.set_ylim(lanes - 0.5, -0.5)
    ticks = range(0, lanes, 1 + lanes // MOST_TICKS)
    axes.set_yticks(ticks, [str(lane + 1) for lane in ticks])
    axes.set_ylabel("worker")
    for lane in range(lanes):
        axes.axhspan(lane - 0.4, lane + 0.4, color="#f2f2f2", linewidth=0)
    kinds = {
        ("once", ONCE): found.times.keys() - found.duplicated,
        ("more-than-once", MORE_THAN_ONCE): found.duplicated,
    }
    for (kind, colour), keys in kinds.items():
        drawn = list(_bars(found.calls, keys, seconds * LEAST_WIDTH))
        bars = PolyCollection(drawn, facecolors=colour)
        bars.set_linewidth(0)
        # All are inside; an SVG would say at each where it is to be cut off.
        bars.set_clip_on(False)
        bars.set_gid(f"{found.name.replace(' ', '-')}-{kind}")
        bars.set_rasterized(len(drawn) > MOST_VECTORS)
        axes.add_collection(bars, autolim=False)


def _summary(found: Counted) -> str:
    doubled = found.duplicates
    return (
        f"{found.name}: {found.jobs:,} jobs ran {found.claimed:,} times, "
        f"{f'{doubled:,} of them' if doubled else 'none'} more than once"
        + (f", {found.lost:,} never" if found.lost else "")
    )


def _bars(
    calls: Iterable[Call], keys: Set[Key], least: float
) -> Iterator[list[tuple[float, float]]]:
    """Yield a bar for each run of these jobs; a call's time is divided among its jobs."""
    for call in calls:
        top, bottom = call.worker - 0.4, call.worker + 0.4
        width = (call.end - call.begin) / len(call.keys)
        for place, key in enumerate(call.keys):
            if key in keys:
                left = call.begin + place * width
                right = left + max(width, least)
                yield [(left, top), (right, top), (right, bottom), (left, bottom)]
