"""The command: ``python -m tests.benchmarks overhead legacy --rounds 5 --svg speed.svg``."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console
from sqlalchemy.exc import ArgumentError, DBAPIError

from tests.benchmarks.ground import NAMES, Ground
from tests.benchmarks.measuring import Line
from tests.servers import Unavailable

FIGURES = {
    "overhead": "what the library adds to its own SQL, beside SQLAlchemy and the driver alone",
    "legacy": "against the legacy loop, a waiting lock, and the article's form",
    "peers": "against kombu, procrastinate, pgqueuer, alchemical-queues (extra bench)",
    "growth": "one claim in large tables, behind rows passed over, beside holders and snapshots",
    "churn": "the last minute of a busy queue against the first",
    "features": "what a lease, a token, a heartbeat and an exclusive key cost",
    "fair": "claims that take turns by a key, with 1,000 and with 100,000 keys",
    "ends": "complete_jobs of 100,000 jobs against 10,000",
    "producers": "producers on MySQL and MariaDB beside many workers",
    "import": "the time of importing atomic_claim",
}
LEAST_ROUNDS = 5


def main() -> int:
    """Measure what was asked for; 1 if a target is missed, 2 if it cannot be measured."""
    options = _options()
    figures = options.figures or list(FIGURES)
    # All of the table where there is no terminal, as in a file.
    console = Console(width=None if sys.stdout.isatty() else 160)
    complaints = Console(stderr=True)
    try:
        from tests.benchmarks.showing import draw, machine, quietness, show, write  # noqa: PLC0415

        urls = dict(_named_url(given) for given in options.url)
        lines: list[Line] = []
        with Ground(urls, options.databases) as ground:
            title = f"{machine()}. {quietness()}"
            console.print(title)
            for figure in figures:
                for found in _measured(figure, ground, options):
                    show(console, figure, found)
                    lines += found
        if options.json:
            document = {"machine": title, "lines": [line.as_json() for line in lines]}
            options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        if options.write:
            write(options.write, title, lines)
        if options.svg:
            draw(options.svg, title, lines)
    except ModuleNotFoundError as error:
        complaints.print(f"{error.name} is missing: pip install 'atomic-claim[test,bench]'")
        return 2
    except (ArgumentError, DBAPIError, OSError, RuntimeError, Unavailable, ValueError) as error:
        complaints.print(str(error).splitlines()[0], markup=False)
        return 2
    missed = [line for line in lines if line.reached is False]
    for line in missed:
        complaints.print(f"missed: {line.figure}: {line.name}, {line.ratio:.2f}", markup=False)
    return 1 if missed else 0


def _measured(figure: str, ground: Ground, options: argparse.Namespace) -> Iterator[list[Line]]:
    module = "importing" if figure == "import" else figure
    measure: Callable[..., Iterator[list[Line]]] = import_module(
        f"tests.benchmarks.{module}"
    ).measure
    rounds = {} if figure == "churn" else {"rounds": options.rounds}
    if figure == "import":
        return measure(**rounds)
    return measure(ground, **rounds, **_own(figure, options))


def _own(figure: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the given options that apply to this figure."""
    given = {
        "overhead": {"limits": options.limits, "calls": options.calls},
        "legacy": {"workers": options.workers, "seconds": options.seconds},
        "peers": {
            "workers": options.workers,
            "limits": options.limits,
            "seconds": options.seconds,
        },
        "growth": {
            "sizes": options.rows,
            "calls": options.calls,
            "minutes": options.minutes,
        },
        "churn": {"minutes": options.minutes},
        "features": {"limits": options.limits},
        "fair": {"limits": options.limits},
        "producers": {"seconds": options.seconds},
        "ends": {},
    }
    return {name: value for name, value in given[figure].items() if value is not None}


def _options() -> argparse.Namespace:
    listed = "\n".join(f"  {name:10} {what}" for name, what in FIGURES.items())
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description=f"Measure claims beside others, in turns.\n\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "figures", nargs="*", metavar="figure", type=_figure, help="left out: all of them"
    )
    add = parser.add_argument
    add("--rounds", type=_at_least(LEAST_ROUNDS), default=7, help="turns of each (at least 5)")
    add("--databases", type=_words(NAMES), default=(), help="such as postgresql,sqlite")
    add("--url", action="append", default=[], help="a database to use; its bench_ tables are lost")
    add("--limits", type=_numbers, help="limits or batches, such as 1,100")
    add("--workers", type=_numbers, help="numbers of workers, such as 1,4,8")
    add("--rows", type=_numbers, help="sizes of the tables of growth, such as 10000,1000000")
    add("--calls", type=_at_least(1), help="claims a turn, of overhead and growth")
    add("--seconds", type=float, help="of a turn of legacy, peers; of all turns of producers")
    add("--minutes", type=float, help="of churn, and of growth beside a snapshot (0: not measured)")
    add("--svg", type=Path, metavar="FILE", help="draw a chart (.svg or .png)")
    add("--write", type=Path, metavar="FILE", help="write the table between the marks of a guide")
    add("--json", type=Path, metavar="FILE", help="write the figures, each with its rounds")
    return parser.parse_args()


def _figure(given: str) -> str:
    if given not in FIGURES:
        raise argparse.ArgumentTypeError(f"{given}: expected one of {', '.join(FIGURES)}")
    return given


def _at_least(least: int) -> Callable[[str], int]:
    def number(given: str) -> int:
        if (found := int(given)) < least:
            raise argparse.ArgumentTypeError(f"{given}: expected at least {least}")
        return found

    return number


def _numbers(given: str) -> Sequence[int]:
    return tuple(int(part) for part in given.split(","))


def _words(known: Sequence[str]) -> Callable[[str], Sequence[str]]:
    def words(given: str) -> Sequence[str]:
        found = given.split(",")
        if unknown := set(found) - set(known):
            raise argparse.ArgumentTypeError(
                f"{', '.join(sorted(unknown))}: expected of {', '.join(known)}"
            )
        return found

    return words


def _named_url(given: str) -> tuple[str, str]:
    """Return the kind of database that a URL names, and the URL."""
    name = given.partition(":")[0].partition("+")[0]
    if name not in NAMES:
        raise ValueError(f"--url {name}: expected one of {', '.join(NAMES)}")
    return name, given


if __name__ == "__main__":
    sys.exit(main())
