"""The planted bugs."""

from tests.model.planted import BUGS, REPOSITORY


def test_each_planted_bug_applies() -> None:
    """The text that each replaces stands once in its module."""
    texts = {bug.path: (REPOSITORY / "atomic_claim" / bug.path).read_text() for bug in BUGS}
    assert [bug.name for bug in BUGS if texts[bug.path].count(bug.old) != 1] == []
