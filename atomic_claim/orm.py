"""Sessions and other ORM objects, without an import of ``sqlalchemy.orm``, which is slow to load.

A session, a session factory or a mapped class can only come from who has imported
``sqlalchemy.orm``, so without that nothing is one. The package has it as an attribute only once its
import is complete, so what another thread is still importing is not looked at. Asynchronous binds
are led back to the synchronous ones behind them likewise.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard

import sqlalchemy
from sqlalchemy.exc import InvalidRequestError

from .errors import ClaimError

if TYPE_CHECKING:
    import sqlalchemy.orm
    from sqlalchemy.orm import Session, sessionmaker

ASYNC = ("AsyncSession", "AsyncConnection", "AsyncEngine")
ASYNC_MAKERS = ("async_scoped_session", "async_sessionmaker")


def session_of(bind: Any) -> Session | None:
    """Return a ``Session``, or that of a ``scoped_session``; None if the bind is neither."""
    if not hasattr(sqlalchemy, "orm"):
        return None
    found = bind.registry() if isinstance(bind, sqlalchemy.orm.scoped_session) else bind
    return found if isinstance(found, sqlalchemy.orm.Session) else None


def is_own(bind: object) -> TypeGuard[sqlalchemy.Engine | sessionmaker[Any]]:
    """Check whether a call by the bind has a transaction of its own."""
    makers = (sqlalchemy.orm.sessionmaker,) if hasattr(sqlalchemy, "orm") else ()
    return isinstance(bind, (sqlalchemy.Engine, *makers))


def note_changes(session: Session, entities: Iterable[object]) -> None:
    """Let a rollback to a savepoint expire entities, as after an UPDATE of SQLAlchemy's own."""
    session._register_altered(map(sqlalchemy.inspect, entities))  # noqa: SLF001 - it has no public name


@contextmanager
def pinned(
    session: Session,
    engine: sqlalchemy.Engine | sqlalchemy.Connection,
    own: sqlalchemy.Connection | None = None,
) -> Iterator[sqlalchemy.Connection]:
    """Send every statement of a session for the table's engine to one connection.

    ``bind_arguments`` do not reach the loads of relationships, and a ``get_bind`` of the session's
    class may ignore them (SQLAlchemy's recipe for routing sessions does). So it is shadowed on
    the instance while statements of ours run.
    """
    if own is None and type(session).get_bind is sqlalchemy.orm.Session.get_bind:
        yield _connection_of(session, engine)
        return
    original, target = session.get_bind, own or engine

    def get_bind(mapper: Any = None, **given: Any) -> Any:
        if given.get("bind") is not None:
            return given["bind"]
        if mapper is not None and _write_bind(original, mapper) is engine:
            return target
        found = original(mapper=mapper, **given)
        return target if found is engine else found

    shadowed = session.__dict__.get("get_bind")
    session.get_bind = get_bind  # type: ignore[method-assign]
    try:
        yield _connection_of(session, target)
    finally:
        if shadowed is None:
            del session.get_bind
        else:
            session.get_bind = shadowed  # type: ignore[method-assign]


def _write_bind(get_bind: Callable[..., Any], mapper: Any) -> Any:
    """Return the engine to which a session sends the writes of a mapped class."""
    mapper = sqlalchemy.inspect(mapper)
    return get_bind(mapper=mapper, clause=sqlalchemy.update(mapper.local_table))


def _connection_of(
    session: Session, bind: sqlalchemy.Engine | sqlalchemy.Connection
) -> sqlalchemy.Connection:
    try:
        return session.connection(bind_arguments={"bind": bind})
    except InvalidRequestError as error:
        raise ClaimError(f"the Session cannot be used: {error}") from error


def async_types() -> tuple[type[Any], ...]:
    """Return the asynchronous bind classes, or an empty tuple if they are not imported."""
    module = sys.modules.get("sqlalchemy.ext.asyncio")
    return () if module is None else tuple(getattr(module, n) for n in (*ASYNC, *ASYNC_MAKERS))


def sync_bind(bind: Any) -> Any:
    """Return the synchronous bind behind an asynchronous one, and any other bind unchanged."""
    if not isinstance(bind, async_types()):
        return bind
    if hasattr(bind, "registry"):
        bind = bind.registry()
    for name in ("sync_session", "sync_connection", "sync_engine"):
        if hasattr(bind, name):
            return getattr(bind, name)
    return _sync_maker(bind)


def _sync_maker(maker: Any) -> sessionmaker[Any]:
    options = dict(maker.kw)
    if options.get("bind") is not None:
        options["bind"] = sync_bind(options["bind"])
    if options.get("binds"):
        options["binds"] = {key: sync_bind(each) for key, each in options["binds"].items()}
    session_class = options.pop("sync_session_class", None) or maker.class_.sync_session_class
    return sqlalchemy.orm.sessionmaker(class_=session_class, **options)
