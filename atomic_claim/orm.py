"""Type checks for ORM objects that do not import ``sqlalchemy.orm``, which is slow to load.

A session, a session factory or a mapped class can only come from who has imported
``sqlalchemy.orm``, so without that nothing is one. The package has it as an attribute only once its
import is complete, so what another thread is still importing is not looked at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

import sqlalchemy

if TYPE_CHECKING:
    import sqlalchemy.orm
    from sqlalchemy.orm import Mapper, Session, scoped_session, sessionmaker


def is_session(given: object) -> TypeGuard[Session]:
    """Check whether the object is a ``Session``."""
    return hasattr(sqlalchemy, "orm") and isinstance(given, sqlalchemy.orm.Session)


def is_scoped(given: object) -> TypeGuard[scoped_session[Any]]:
    """Check whether the object is a ``scoped_session``."""
    return hasattr(sqlalchemy, "orm") and isinstance(given, sqlalchemy.orm.scoped_session)


def is_maker(given: object) -> TypeGuard[sessionmaker[Any]]:
    """Check whether the object is a ``sessionmaker``."""
    return hasattr(sqlalchemy, "orm") and isinstance(given, sqlalchemy.orm.sessionmaker)


def is_mapper(given: object) -> TypeGuard[Mapper[Any]]:
    """Check whether the object is a mapped class's ``Mapper``."""
    return hasattr(sqlalchemy, "orm") and isinstance(given, sqlalchemy.orm.Mapper)
