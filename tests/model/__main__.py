"""Explores scenarios for some minutes, and prints the failing example as a script.

python -m tests.model --minutes 10 --seed 1 --database postgresql
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.databases import KINDS, NAMES, Database, SQLiteDatabase
from tests.model.known import known_fault
from tests.model.runner import Violation, run
from tests.model.scenario import Scenario
from tests.model.strategies import incoherent, scenarios
from tests.model.world import Places
from tests.processes import Workspace

SCRIPT = '''"""An example on which the library does what the model does not allow.

{said}
"""

from tests.model.__main__ import replay
from tests.model.scenario import *

replay({scenario}, "{database}")
'''


class TimeOverError(KeyboardInterrupt):
    """The time is over; Hypothesis lets go at once of this kind of exception alone."""


@contextmanager
def places(name: str) -> Iterator[Places]:
    """Yield the databases for scenarios, on a server that is started for them."""
    with ExitStack() as left:
        folder = Path(left.enter_context(tempfile.TemporaryDirectory()))
        other = left.enter_context(SQLiteDatabase(folder))
        databases: list[Database] = []
        if name == "sqlite":
            databases = [left.enter_context(SQLiteDatabase(folder)) for _ in range(2)]
        else:
            server, kind = KINDS[name]
            made = server(left.enter_context(Workspace()))
            databases = [left.enter_context(kind(made)) for _ in range(2)]
        found = Places(databases[0], databases[1], other)
        left.callback(found.watch.dispose)
        yield found


def replay(scenario: Scenario, database: str) -> None:
    """Run one scenario, and say whether it fails."""
    with places(database) as found:
        run(scenario, found)
    print("the model allows all of it")  # noqa: T201 - a command


def explore(
    name: str, number: int, minutes: float, *, known: bool = False, spoilt: bool = False
) -> str | None:
    """Draw scenarios until the time is over or one fails; return the script of the smallest."""
    end = time.monotonic() + 60 * minutes
    smallest: dict[str, str] = {}
    tried = 0
    with places(name) as found:

        @seed(number)
        @settings(
            max_examples=100_000,
            deadline=None,
            database=None,
            report_multiple_bugs=False,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given((incoherent if spoilt else scenarios)(name))
        def check(scenario: Scenario) -> None:
            nonlocal tried
            if time.monotonic() > end and not smallest:
                raise TimeOverError
            if not known and known_fault(scenario, name) is not None:
                return
            tried += 1
            try:
                run(scenario, found)
            except Violation as error:
                said = str(error).replace("\\", "\\\\").replace('"""', "'''")
                smallest["script"] = SCRIPT.format(said=said, scenario=scenario, database=name)
                raise

        try:
            check()
        except TimeOverError:
            return None
        except Violation:
            return smallest["script"]
        finally:
            print(f"{tried} scenarios", file=sys.stderr)  # noqa: T201 - a command
    return None


def main() -> int:
    """Read the command line, and explore."""
    parser = argparse.ArgumentParser(prog="python -m tests.model", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1, help="how long to draw scenarios")
    parser.add_argument("--seed", type=int, default=0, help="what the drawing begins with")
    parser.add_argument("--database", choices=NAMES, default="sqlite", help="where to run them")
    parser.add_argument("--known", action="store_true", help="draw known faults too")
    parser.add_argument("--incoherent", action="store_true", help="draw only such declarations")
    given = parser.parse_args()
    script = explore(
        given.database, given.seed, given.minutes, known=given.known, spoilt=given.incoherent
    )
    if script is not None:
        print(script)  # noqa: T201 - a command
    return int(script is not None)


if __name__ == "__main__":
    sys.exit(main())
