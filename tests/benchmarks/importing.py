"""How much longer ``import atomic_claim`` takes than ``import sqlalchemy``."""

import statistics
import subprocess
import sys
from collections.abc import Iterator

from tests.benchmarks.measuring import Line

FIGURE = "import"
# The least of so many is a round's, since nothing makes an import shorter than it is.
TRIES = 5
MOST_MILLISECONDS = 20
PROGRAM = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"


def measure(*, rounds: int) -> Iterator[list[Line]]:
    """The seconds of both imports, each in fresh processes, in turns."""
    found: dict[str, list[float]] = {"sqlalchemy": [], "atomic_claim": []}
    for _ in range(rounds):
        for name, times in found.items():
            times.append(min(_seconds(name) for _ in range(TRIES)))
    ours, theirs = found["atomic_claim"], found["sqlalchemy"]
    more = 1000 * statistics.median(a - b for a, b in zip(ours, theirs, strict=True))
    base = statistics.median(theirs)
    yield [
        Line(
            FIGURE,
            "import atomic_claim",
            1000 * statistics.median(ours),
            "ms",
            f"import sqlalchemy: {1000 * base:.0f} ms",
            tuple(a / b for a, b in zip(ours, theirs, strict=True)),
            most=round(1 + MOST_MILLISECONDS / (1000 * base), 3),
            note=f"{more:.1f} ms more, at most {MOST_MILLISECONDS} wanted",
        )
    ]


def _seconds(name: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(name)], check=True, capture_output=True, text=True
    )
    return float(done.stdout)
