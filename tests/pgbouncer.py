"""A PgBouncer of a test's own, installed or downloaded, in front of a test's database."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import sqlalchemy as sa

from tests import debian
from tests.conftest import skip_or_fail
from tests.databases import Database
from tests.processes import Account, Workspace, free_port
from tests.servers import Programs, _answers, _installed

PROGRAM: Final = "pgbouncer"
CONFIGURATION: Final = """\
[databases]
{name} = dbname={name} {server}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {own_port}
unix_socket_dir =
auth_type = any
pool_mode = {mode}
"""


def programs() -> Programs:
    """Where PgBouncer is."""
    for found in _installed([PROGRAM]):
        return found
    return Programs(debian.unpacked(PROGRAM), f"usr/sbin/{PROGRAM}", bundled=True)


@contextmanager
def pgbouncer(database: Database, workspace: Workspace, mode: str) -> Iterator[sa.URL]:
    """Yield the database's URL through a pooler, or skip the test.

    Args:
        database: one on PostgreSQL.
        workspace: where the pooler runs.
        mode: its ``pool_mode``.
    """
    account = Account.without_rights("postgres")
    try:
        found = programs().reachable(workspace, account)
    except debian.PackageError as error:
        reason = str(error)
    else:
        reason = ""
    if reason:
        skip_or_fail(f"PgBouncer is not available: {reason}")
    home = account.make_folder(workspace.folder / f"{PROGRAM}-{mode}")
    url, own_port = database.url, free_port()
    server = {"host": url.host, "port": url.port, "user": url.username, "password": url.password}
    configuration = home / "pgbouncer.ini"
    text = CONFIGURATION.format(
        name=url.database,
        server=" ".join(f"{name}={value}" for name, value in server.items() if value),
        own_port=own_port,
        mode=mode,
    )
    configuration.write_text(text, encoding="utf-8")
    configuration.chmod(0o644)
    pooler = workspace.start(
        [*found.words, str(configuration)],
        account=account,
        folder=home,
        stop_signal=signal.SIGTERM,
    )
    pooled = url.set(host="127.0.0.1", port=own_port)
    pooler.wait_until(lambda: _answers(pooled))
    try:
        yield pooled
    finally:
        # What it still holds would keep the database from being dropped.
        pooler.stop()
