"""The rule for exclusive keys is safe as built, and not without any one of its parts."""

from __future__ import annotations

from typing import Final

import pytest

from tests.model.exclusive_rule import (
    Row,
    Rule,
    State,
    explore,
    is_unsafe,
    search,
    start,
    successors,
)

pytestmark = pytest.mark.once

WORKERS: Final = (2, 3)
CLAIMED: Final = [
    "worker 1, claim row 1: lock",
    "worker 1, claim row 1: look",
    "worker 1, claim row 1: mark",
    "worker 1, claim row 1: commit",
    "worker 1, claim row 1: unlock",
]
# Each part of the rule, and the shortest way to two running rows without it.
PARTS: Final = {
    # The second look does not see the first mark.
    "lock_until_commit": [
        "worker 1, claim row 1: lock",
        "worker 1, claim row 1: look",
        "worker 1, claim row 1: mark",
        "worker 1, claim row 1: unlock",
        "worker 2, claim row 2: lock",
        "worker 2, claim row 2: look",
        "worker 1, claim row 1: commit",
        "worker 2, claim row 2: mark",
        "worker 2, claim row 2: unlock",
        "worker 2, claim row 2: commit",
    ],
    # The second look is over when the second claim gets the lock.
    "lock_before_look": [
        "worker 1, claim row 1: look",
        "worker 1, claim row 1: lock",
        "worker 1, claim row 1: mark",
        "worker 2, claim row 2: look",
        "worker 1, claim row 1: commit",
        "worker 1, claim row 1: unlock",
        "worker 2, claim row 2: lock",
        "worker 2, claim row 2: mark",
        "worker 2, claim row 2: commit",
    ],
    # The second look believes an end that is rolled back.
    "reads_committed": [
        *CLAIMED,
        "worker 1, end row 1: mark",
        "worker 2, claim row 2: lock",
        "worker 2, claim row 2: look",
        "worker 1, end row 1: roll back",
        "worker 2, claim row 2: mark",
        "worker 2, claim row 2: commit",
    ],
    # The second look sees a lease that is over, and its extension is committed afterwards.
    "extension_locks": [
        *CLAIMED,
        "worker 1, extend row 1: look",
        "worker 1, extend row 1: mark",
        "worker 2, claim row 2: lock",
        "the lease of row 1 runs out",
        "worker 2, claim row 2: look",
        "worker 1, extend row 1: commit",
        "worker 2, claim row 2: mark",
        "worker 2, claim row 2: commit",
    ],
}


def replayed(rule: Rule, workers: int, steps: list[str]) -> list[State]:
    """Return the states that the steps lead through; each step is possible in exactly one way."""
    states = [start(workers)]
    for step in steps:
        (after,) = [after for name, after in successors(rule, states[-1]) if name == step]
        states.append(after)
    return states


@pytest.mark.parametrize("workers", WORKERS)
def test_the_rule_is_safe(workers: int) -> None:
    """No order of the steps of two or three workers runs two rows of a key at once."""
    assert search(Rule(), workers) is None


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("part", PARTS)
def test_each_part_is_needed(part: str, workers: int) -> None:
    """Without any one part two rows of a key run at once, and first do so in the last state."""
    rule = Rule(**{part: False})
    steps = search(rule, workers)
    assert steps is not None
    *before, last = replayed(rule, workers, steps)
    assert not any(map(is_unsafe, before))
    assert is_unsafe(last)
    assert {row.state for row in last.rows} == {"running"}
    assert len({row.owner for row in last.rows}) == 2
    assert steps == PARTS[part]


def test_a_committed_read_refuses_the_dirty_look() -> None:
    """The look that believes an uncommitted end is not possible once it reads committed data."""
    steps = PARTS["reads_committed"]
    look = steps.index("worker 2, claim row 2: look")
    assert "worker 1, end row 1: mark" in steps[:look]
    assert "worker 1, end row 1: roll back" in steps[look:]
    *_, state = replayed(Rule(), 2, steps[:look])
    assert steps[look] in dict(successors(Rule(reads_committed=False), state))
    assert steps[look] not in dict(successors(Rule(), state))


def test_the_search_is_not_empty() -> None:
    """A safe search has gone through reclaims, late extensions and an end followed by a claim."""
    states = list(explore(Rule(), 2))
    running, over = Row("running", True, 0), Row("running", False, 1)
    rows = {state.rows for state in states}
    assert {(running, over), (running, Row("ended")), (Row("free"), running)} <= rows
    # One transaction ends a row and claims the other.
    assert (Row("ended", False, 0), running) in {state.written for state in states}
    # An extension keeps a row whose committed lease runs out before the commit.
    assert any(
        state.rows[0] == Row("running", False, 0) and state.written[0] == running
        for state in states
    )
