"""Events of the ORM that a claim in place of a flush does not fire."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session, sessionmaker

from atomic_claim.job_table import JobTable


def listened(job_table: JobTable, written: set[str], *, delete: bool) -> list[str]:
    """Return the events of the mapper and of the written attributes that have listeners."""
    mapper = job_table.mapper
    if mapper is None:
        return []
    verb = "delete" if delete else "update"
    found = [name for name in (f"before_{verb}", f"after_{verb}") if getattr(mapper.dispatch, name)]
    if delete:
        return found
    for key, column in mapper.columns.items():
        if column.name not in written:
            continue
        if key in mapper.validators:
            found.append(f"@validates({key!r})")
        elif key in mapper.all_orm_descriptors and list(getattr(mapper.class_, key).dispatch.set):
            found.append(f"set of {key!r}")
    return found


def listening(bind: Any) -> list[str]:
    """Return the events of a session's flush that have listeners."""
    session = bind() if isinstance(bind, sessionmaker) else bind
    if not isinstance(session, Session):
        return []
    names = ("before_flush", "after_flush", "after_flush_postexec")
    return [name for name in names if any(map(_is_foreign, getattr(session.dispatch, name)))]


def _is_foreign(listener: Any) -> bool:
    """Check whether a listener is not one of our own, which watch the reads of other patches."""
    return not str(getattr(listener, "__module__", "")).startswith("atomic_claim.")
