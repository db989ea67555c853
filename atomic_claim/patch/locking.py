"""Legacy functions that find, work and mark in one transaction: their reads lock."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any
from weakref import WeakSet

from sqlalchemy import Connection, Delete, Select, Update, false

from atomic_claim.backends import Transaction, backend_for
from atomic_claim.errors import ClaimConflict, ClaimError, PatchError, UnsupportedDialect
from atomic_claim.job_table import JobTable

from .calls import Options
from .patches import Patch, Run, make_patch
from .reads import Watch, unwatched, watching
from .selects import with_conditions
from .sessions import unlocking
from .tables import Tables, keyed
from .targets import Target


def lock_reads(target: Any, table: Any, *, limit: int | None = None) -> Patch:
    """Make a function that finds, works and marks in one transaction lock what it finds.

    The function runs as it is. While it does, its SELECTs of the table, and no others, lock the
    rows that they return until its transaction ends, and skip what other workers hold: on
    PostgreSQL by ``FOR NO KEY UPDATE OF`` the table ``SKIP LOCKED``; on MySQL and MariaDB by a
    search for keys and a lock on exactly those (10,000 at a time at most), since a locking read
    locks what it scans; on SQLite by taking the database's write lock before the read, as ``BEGIN
    IMMEDIATE`` does, so that one worker works at a time. A dead worker's rows are unlocked.

    Entities and relationships that are loaded of what was found are read as ever, and so is
    everything outside of the call, in other threads, and in tasks that were there before.

    Args:
        target: as for :func:`patch_claims`.
        table: the table that the jobs are found in, as for :func:`patch_claims`. It needs no
            state. Another object for the same table, as a reflected one, will do.
        limit: how many rows each find locks at most; left out, as many as it asks for.

    Returns:
        The :class:`Patch`. Its ``claimed`` counts the rows that were marked, its
        ``passed_through`` the calls that read nothing of the table.

    Raises:
        PatchError: the target does not fit; or, by a call, what cannot be protected: a mark after
            the transaction of the read has ended (``claim_reads`` is for that), a connection in
            AUTOCOMMIT, a SELECT that cannot be locked, or raw SQL that reads the table.
    """

    def prepare(patch: Patch, found: Target) -> Run:
        function = found.function
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise PatchError(
                f"{found.name} is a generator, and a commit of its consumer, between two "
                "rows, would end its locks: patch the function that consumes it, or use "
                "claim_reads()"
            )
        tables = Tables(table, Options(found), keyed_by_row)
        return watching(patch, function, partial(LockWatch, patch, tables, limit))

    def keyed_by_row(given: Any) -> JobTable:
        if isinstance(given, JobTable) and given.has_keys:
            raise PatchError(
                f"{given!r} does not go with lock_reads: a lock on a row says nothing of the "
                "other rows with its exclusive or fair key; claim before the work with "
                "claim_reads()"
            )
        return keyed(given)

    return make_patch(target, prepare)


class LockWatch(Watch):
    """A running call whose finds are locked."""

    def __init__(self, *watched: Any) -> None:
        super().__init__(*watched)
        self._locked: WeakSet[Connection] = WeakSet()

    def read(
        self, connection: Connection, statement: Any, params: Mapping[str, Any]
    ) -> Select[Any] | None:
        """Lock, before or by the SELECT itself."""
        find = self.find(connection, statement, params)
        if find is None:
            return None
        tx = Transaction(backend_for(connection.dialect), connection, connection, own=False)
        try:
            with unwatched():
                leave = unlocking(connection, self.job_table)
                locking = tx.backend.lock_read(tx, find)
                if leave is not None and connection.execute(find.statement, params).first() is None:
                    # A function that finds nothing has no reason to end the transaction.
                    leave()
                    locking = with_conditions(find.statement, false())
        except (ClaimConflict, UnsupportedDialect):
            raise
        except ClaimError as error:
            raise PatchError(
                f"{self.patch.target} cannot be protected by lock_reads: {error}; or claim before "
                "the work with claim_reads()"
            ) from error
        self.reads += 1
        self._locked.add(connection)
        return locking

    def mark(
        self,
        connection: Connection,
        statement: Update | Delete | None,  # noqa: ARG002 - whatever it asks for
    ) -> None:
        """Refuse what is not locked any more."""
        if self.reads and connection not in self._locked:
            raise PatchError(
                f"{self.patch.target} changes {self.table.fullname!r} in another "
                "transaction than the one it found the rows in, whose end (a commit between two "
                "rows) ended their locks: other workers may have them. Use claim_reads() instead"
            )

    def marked(self, rows: int) -> None:
        """Count what was done."""
        self.patch.count(claimed=rows)

    def ended(self, connection: Connection) -> None:
        """Note that the transaction's locks are gone."""
        self._locked.discard(connection)
