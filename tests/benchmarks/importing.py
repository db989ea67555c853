"""How much longer importing what a worker uses takes than ``import sqlalchemy``."""

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping

from tests.benchmarks.measuring import Line

FIGURE = "import"
# The least of so many is a round's, since nothing makes an import shorter than it is.
TRIES = 5
MOST_MILLISECONDS = 20
STATEMENTS = {
    "sqlalchemy": "import sqlalchemy",
    # By name: what is only looked up when it is asked for would not be counted otherwise.
    "atomic_claim": "from atomic_claim import JobTable, claim_jobs, complete_jobs",
}
PROGRAM = "import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"


def measure(*, rounds: int) -> Iterator[list[Line]]:
    """Measure the imports of the library and of SQLAlchemy in fresh processes, in turns."""
    found: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    with tempfile.TemporaryDirectory() as folder:
        # Both from bytecode, as they are once installed, whatever was set for this process.
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": folder, "PYTHONDONTWRITEBYTECODE": ""}
        for statement in STATEMENTS.values():
            _seconds(statement, environment)
        for _ in range(rounds):
            for name, times in found.items():
                times.append(min(_seconds(STATEMENTS[name], environment) for _ in range(TRIES)))
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


def _seconds(statement: str, environment: Mapping[str, str]) -> float:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(statement)],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
    )
    return float(done.stdout)
