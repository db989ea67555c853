"""The examples of patched legacy code do what they say."""

from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa

from examples.patching import patches
from tests.databases import Database

EXPECTED: dict[Callable[[sa.Engine], Any], Any] = {
    patches.payload: ([[1, 2], [3], []], 3),
    patches.flask: ([1, 2, None], 2),
    patches.sqlmodel_tasks: ([1, 2, None], 2),
    patches.query: ([[1, 2], [3], []], 3),
    patches.on_loop: ([[1, 2], [3], []], 3),
    patches.outbox: ([10, 2, 0], 12, 12),
    patches.mail_queue: ([4, 0, 0], 4, [1, 2, 3, 4]),
    patches.early: ([1, 2, None], 2),
}


@pytest.mark.databases("sqlite", "postgresql")
@pytest.mark.parametrize("example", EXPECTED)
def test_example(database: Database, example: Callable[[sa.Engine], Any]) -> None:
    """Each legacy function gives each job once, and nothing after the last."""
    assert set(EXPECTED) == set(patches.EXAMPLES)
    assert example(database.engine()) == EXPECTED[example]
