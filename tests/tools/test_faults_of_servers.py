"""Faults that `atomic-claim doctor` finds on servers that are set up for them."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from tests.commands import Command
from tests.databases import ServerDatabase
from tests.own_servers import OwnServer, own_server
from tests.tools.test_doctor import ails, execute
from tests.tools.test_faults import waiting
from tests.waiting import wait_until

pytestmark = pytest.mark.once

SPEC = "tests.tools.test_faults:declared"
AT_ONCE = ("--transaction-after", "0")


@pytest.fixture(scope="module")
def server() -> Iterator[OwnServer]:
    """Yield a server that prepares transactions and has a replica."""
    with own_server("postgresql") as server:
        yield server


@pytest.fixture
def own_database(server: OwnServer) -> Iterator[ServerDatabase]:
    """Yield an empty database on it."""
    with server.database() as database:
        yield database


def findings(command: Command, url: sa.URL) -> list[dict[str, Any]]:
    """Return what the doctor finds on the table at an address."""
    text = url.render_as_string(hide_password=False)
    ended = command("doctor", "--url", text, "--table", SPEC, "--json")
    assert not ended.err
    found: list[dict[str, Any]] = json.loads(ended.out)["findings"]
    return found


def test_a_replica(server: OwnServer, own_database: ServerDatabase, command: Command) -> None:
    """A server that takes no writes is the one thing found there, and nothing on the primary."""
    waiting(own_database)
    url = server.replica().set(database=own_database.url.database)
    following = own_database.engine(url=url)

    def has_come() -> bool:
        return sa.inspect(following).has_table("jobs") and not findings(command, own_database.url)

    wait_until(has_come)
    (found,) = findings(command, url)
    assert (found["check"], found["level"]) == ("replica", "problem")
    assert found["found"] == "the server is a replica, and takes no writes"
    assert found["fix"] == "give the primary's URL"
    # The cure that is said.
    assert findings(command, own_database.url) == []


def test_a_prepared_transaction(own_database: ServerDatabase, command: Command) -> None:
    """A forgotten one is found by its name and its owner, and the cure ends it."""
    engine = waiting(own_database)
    assert ails(command, own_database, *AT_ONCE, table=SPEC) == {}
    with engine.connect() as connection:
        transaction = connection.begin_twophase("left_over")
        connection.execute(sa.text("UPDATE jobs SET attempts = 1 WHERE id = 1"))
        transaction.prepare()
        connection.invalidate()
    found = ails(command, own_database, *AT_ONCE, table=SPEC)
    assert list(found) == ["old transactions"]
    assert found["old transactions"]["found"] == "prepared transaction left_over of postgres"
    execute(own_database, found["old transactions"]["sql"])
    assert ails(command, own_database, *AT_ONCE, table=SPEC) == {}
