"""Type checks for ORM objects that do not import ``sqlalchemy.orm``, which is slow to load.

A session, a session factory or a mapped class can only come from who has imported
``sqlalchemy.orm``, so without that nothing is one. The package has it as an attribute only once its
import is complete, so what another thread is still importing is not looked at. Asynchronous binds
are led back to the synchronous ones behind them likewise.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeGuard

import sqlalchemy

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
