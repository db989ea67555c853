"""Measuring in turns: the ratio of each round, their median, and how far they lie apart."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Way = Callable[[], object]


@dataclass(frozen=True)
class Line:
    """One figure.

    Attributes:
        figure: which of the figures it belongs to.
        name: what was measured.
        value: the median of its rounds.
        unit: what the value is in.
        against: what it is compared with.
        ratios: the ratio of each round, or of each slice of time; more than 1 is more of the unit.
        least: the ratio that is to be reached at least.
        accepted: a ratio below it that is accepted.
        most: the ratio that is to be kept below.
        note: what else was seen.
    """

    figure: str
    name: str
    value: float
    unit: str
    against: str
    ratios: tuple[float, ...]
    least: float | None = None
    most: float | None = None
    note: str = ""
    accepted: float | None = None

    @property
    def ratio(self) -> float:
        """The median of the rounds' ratios."""
        return statistics.median(self.ratios)

    @property
    def spread(self) -> tuple[float, float]:
        """The smallest and the largest of them."""
        return min(self.ratios), max(self.ratios)

    @property
    def reached(self) -> bool | None:
        """Return True if the figure meets its target, or None if it has no target."""
        if self.least is None and self.most is None:
            return None
        least = self.least if self.accepted is None else self.accepted
        enough = least is None or self.ratio >= least
        return enough and (self.most is None or self.ratio <= self.most)

    def as_json(self) -> dict[str, Any]:
        """Return the figure together with its derived values."""
        return asdict(self) | {
            "ratio": self.ratio,
            "spread": self.spread,
            "reached": self.reached,
        }


def in_turns(
    ways: Mapping[str, Way],
    *,
    rounds: int,
    calls: int,
    before: Callable[[str], None] = lambda _: None,
) -> dict[str, list[list[float]]]:
    """Measure the seconds of every call, by way and round.

    Args:
        ways: what is called, by name.
        rounds: how often all of them have their turn; every second time in reverse.
        calls: how often a way is called in its turn.
        before: called before each turn; it is not measured, and neither are two calls after it.
    """
    found: dict[str, list[list[float]]] = {name: [] for name in ways}
    for turn in range(rounds):
        for name in list(ways) if turn % 2 else reversed(list(ways)):
            before(name)
            way = ways[name]
            for _ in range(2):
                way()
            gc.collect()
            times = []
            for _ in range(calls):
                begin = time.perf_counter()
                way()
                times.append(time.perf_counter() - begin)
            found[name].append(times)
    return found


def alternating(
    ways: Mapping[str, Way],
    *,
    rounds: int,
    calls: int,
    before: Callable[[], object],
) -> dict[str, list[list[float]]]:
    """Measure the seconds of every call, by way and round, while the ways alternate call by call.

    What slows the machine for a moment meets all of them alike, and all find the table as full as
    the others do.

    Args:
        ways: what is called, by name.
        rounds: how often the table is prepared and all ways are called.
        calls: how often each way is called in a round; every second time in reverse.
        before: called before each round; it is not measured, and neither is one call of each after
            it.
    """
    found: dict[str, list[list[float]]] = {name: [] for name in ways}
    names = list(ways)
    for _ in range(rounds):
        before()
        for way in ways.values():
            way()
        times: dict[str, list[float]] = {name: [] for name in ways}
        gc.collect()
        gc.disable()
        try:
            for call in range(calls):
                for name in names if call % 2 else reversed(names):
                    begin = time.perf_counter()
                    ways[name]()
                    times[name].append(time.perf_counter() - begin)
        finally:
            gc.enable()
        for name in names:
            found[name].append(times[name])
    return found


def check_whole(found: Sequence[Any], limit: int) -> None:
    """Raise if the measured claim did not return exactly `limit` rows."""
    if len(found) != limit:
        raise AssertionError(f"{len(found)} rows were claimed, expected {limit}")


def percentile(times: Sequence[float], part: float) -> float:
    """Return the time that this fraction of all times does not exceed."""
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def rates(turns: Sequence[Sequence[float]]) -> list[float]:
    """Return the calls per second of each round."""
    return [len(times) / sum(times) for times in turns]


def typical_rates(turns: Sequence[Sequence[float]]) -> list[float]:
    """Return the calls per second of each round, by the median call."""
    return [1 / statistics.median(times) for times in turns]


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, ...]:
    """Ours by theirs, by round."""
    return tuple(one / other for one, other in zip(ours, theirs, strict=True))
