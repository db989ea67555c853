"""Where the claim of a patched function runs, and who ends its transaction."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
)
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from atomic_claim.backends.drivers import in_transaction
from atomic_claim.claim import Claim
from atomic_claim.errors import PatchError
from atomic_claim.job_table import JobTable
from atomic_claim.orm import async_types, sync_bind

from .calls import Call, Options, Reading, Reference
from .sources import commit_note
from .targets import Target

SESSIONS = ("session", "db_session", "async_session", "db", "sess", "connection", "conn", "engine")
MAKERS = (Engine, sessionmaker)
BINDS = (Session, scoped_session, Connection, *MAKERS)


@dataclass(frozen=True, eq=False)
class Opened:
    """The bind of one claim, and who ends its transaction.

    Attributes:
        bind: as it was given.
        sync: the synchronous bind behind it.
        own: whether the patch opened it.
        commits: whether the claim is committed at the end.
        began: whether no transaction had begun before.
    """

    bind: Any
    sync: Any
    own: bool
    commits: bool
    began: bool

    @property
    def is_maker(self) -> bool:
        """Check whether each operation has a transaction of its own."""
        return isinstance(self.sync, MAKERS)

    def end(self, claim: Claim[Any]) -> None:
        """Commit if asked to; a transaction that began before an empty claim is the caller's."""
        if self.commits and (claim or self.began or self.own):
            _commit(self.sync, claim)


class Sessions:
    """The session of each call of a patched function.

    Args:
        target: the function.
        options: reads the options of its patch.
        session: the option of that name.
        commit: the option of that name.
        opens: whether an engine or a factory is opened, so that what fails later is rolled back.
    """

    def __init__(
        self, target: Target, options: Options, session: Any, commit: Any, *, opens: bool
    ) -> None:
        self._target = target
        self._opens = opens
        given = self._parameter() if session is None else session
        self.session = options.reading("session", given, is_bind)
        self.commit = options.reading("commit", commit)
        found = options.found(given) if isinstance(given, Reference) else self.session.given
        if self.commit.given is None and self._is_callers(found):
            raise self._unsaid()

    def _parameter(self) -> str:
        found = [name for name in SESSIONS if name in self._target.signature.parameters]
        if len(found) == 1:
            return found[0]
        several = f"several of its parameters fit ({', '.join(found)})"
        raise PatchError(
            f"{self._target.name}: no session to claim in is named, and "
            f"{several if found else 'none of its parameters is called session'}: write "
            "session='parameter', session='self.session', session=SessionLocal or session=engine, "
            "in a file session = 'package.module:SessionLocal'"
        )

    def _is_callers(self, given: Any) -> bool:
        """Check whether a session of the caller's is asked for by its name, or given."""
        if not isinstance(given, str):
            return is_bind(given) and hasattr(given, "commit")
        first, *rest = given.split(".")
        annotation = str(self._target.signature.parameters[first].annotation)
        if not rest and ("Engine" in annotation or "maker" in annotation):
            return False
        owner = self._target.places[0].owner if self._target.places else None  # type: ignore[union-attr]
        member = inspect.getattr_static(owner, rest[0], None) if len(rest) == 1 else None
        last = given.rpartition(".")[2]
        return last in SESSIONS and last != "engine" and not inspect.isroutine(member)

    def _unsaid(self) -> PatchError:
        return PatchError(
            f"{self._target.name}: the claim runs in a session of the caller's "
            f"(session={self.session.given!r}), so say whether it is committed: write "
            f"{commit_note(self._target.function)}"
        )

    @asynccontextmanager
    async def open(self, call: Call, *, waits: bool) -> AsyncIterator[Opened]:
        """Yield the session of a call, and close it at the end if the patch opened it.

        Args:
            call: the call.
            waits: whether it is a coroutine's, which alone may wait for a session.
        """
        async with AsyncExitStack() as stack:
            newest, bind = self._read(call)
            if waits and inspect.isawaitable(bind):
                bind = await bind
            is_entered = False
            if not is_bind(bind) and waits and isinstance(bind, AbstractAsyncContextManager):
                is_entered, bind = True, await stack.enter_async_context(bind)
            elif not is_bind(bind) and isinstance(bind, AbstractContextManager):
                is_entered, bind = True, stack.enter_context(bind)
            if not waits and isinstance(bind, async_types()):
                raise PatchError(
                    f"session={self.session.given!r} of {self._target.name} is {bind!r}, which "
                    "only a coroutine can use: give a synchronous one"
                )
            opened = self._opened(call, bind, newest, is_entered=is_entered)
            if opened.own and not is_entered:
                if isinstance(bind, async_types()):
                    stack.push_async_callback(bind.close)
                else:
                    stack.callback(bind.close)
            yield opened

    def _read(self, call: Call) -> tuple[int, Any]:
        """Return the number of the newest session before, and what the option gives."""
        newest = Session().hash_key
        given = self.session.read(call)
        if inspect.isroutine(given):
            given = given()
        if self._opens and isinstance(sync_bind(given), MAKERS):
            given = given.begin()
        if inspect.isgenerator(given):
            return newest, contextmanager(lambda: given)()
        if inspect.isasyncgen(given):
            return newest, asynccontextmanager(lambda: given)()
        return newest, given

    def _opened(self, call: Call, bind: Any, newest: int, *, is_entered: bool) -> Opened:
        # The session of a registry is the caller's, even if this is its first use.
        is_scoped = is_bind(bind) and hasattr(bind, "registry")
        sync = sync_bind(bind.registry() if is_scoped else bind)
        if not isinstance(sync, (Session, Connection)):
            # An engine or a factory; the claim itself refuses what is no bind.
            return Opened(bind, sync, own=False, commits=False, began=True)
        is_new = not is_scoped and isinstance(sync, Session) and sync.hash_key > newest
        is_made = isinstance(sync, Connection) and _makes(self.session)
        own = is_entered or is_new or is_made
        commit = self.commit.read(call)
        if commit is None and not own:
            raise self._unsaid()
        if own and commit is False:
            raise PatchError(
                f"{self._target.name}: session={self.session.given!r} is opened for the claim "
                "alone, so commit=False would undo it: leave commit= out"
            )
        return Opened(bind, sync, own, own or bool(commit), not sync.in_transaction())


def _makes(session: Reading) -> bool:
    return callable(session.given) and not session.constant and session.names == frozenset()


def is_bind(given: Any) -> bool:
    """Check whether a claim can run in it as it is."""
    return isinstance(given, (*BINDS, *async_types()))


def unlocking(bind: Any, job_table: JobTable) -> Callable[[], None] | None:
    """Return a function that releases SQLite's write lock after an empty claim, if it is free.

    On SQLite an UPDATE takes the database's only write lock even if it changes no row, and the
    caller of a function that found nothing has no reason to end the transaction.
    """
    connection = bind
    if isinstance(bind, Session):
        if bind.autoflush:
            bind.flush()
        arguments = {"mapper": job_table.mapper, "clause": job_table.table}
        if bind.get_bind(**arguments).dialect.name != "sqlite":
            return None
        connection = bind.connection(bind_arguments=arguments)
    if not isinstance(connection, Connection) or connection.dialect.name != "sqlite":
        return None

    def leave() -> None:
        if in_transaction(connection.connection.driver_connection):
            connection.exec_driver_sql("ROLLBACK")

    return None if in_transaction(connection.connection.driver_connection) else leave


def _commit(bind: Any, claim: Claim[Any]) -> None:
    """Commit, and leave the claimed entities loaded; all others expire as they would."""
    if not isinstance(bind, Session) or not bind.expire_on_commit:
        bind.commit()
        return
    bind.expire_on_commit = False
    try:
        bind.commit()
    finally:
        bind.expire_on_commit = True
    claimed = {id(job) for job in claim}
    for entity in list(bind.identity_map.values()):
        if id(entity) not in claimed:
            bind.expire(entity)
