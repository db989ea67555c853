"""The table of a patch: found now or at the first call, with or without a state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import NoSuchTableError
from sqlalchemy.orm import Session, sessionmaker

from atomic_claim.columns import mapper_of, tables_of
from atomic_claim.errors import AmbiguousTable, ClaimError, PatchError
from atomic_claim.inference import read_columns
from atomic_claim.job_table import JobTable, job_table_of
from atomic_claim.references import reflected
from atomic_claim.state_values import UNSET

from .calls import Call, Options, Reference


def stateless(table: Any) -> JobTable:
    """Create a ``JobTable`` for jobs that a claim deletes.

    What can be read of its columns (when a job is due, what comes first, and even a state) holds.

    Raises:
        AmbiguousTable: a column could be a state, and cannot be read with certainty.
    """
    try:
        return job_table_of(table)
    except AmbiguousTable:
        reading = read_columns(_table_of(table), ordered=True)
        if len(reading.problems) > 1 or "state" in reading.arguments:
            raise
        found = reading.arguments
        return keyed(table, **{role: found[role] for role in ("due", "order") if role in found})


def keyed(table: Any, **known: Any) -> JobTable:
    """Create a ``JobTable`` for which every row is free, even a claimed one."""
    if isinstance(table, JobTable):
        table = table.entity or table.table
    key = next(iter(_table_of(table).primary_key.columns), None)
    return JobTable(table, free=sa.true(), claimed={} if key is None else {key: key}, **known)


def leased_only(job_table: JobTable) -> JobTable:
    """Return a ``JobTable`` whose claims write only the lease; the state marks finished jobs."""
    if job_table.exclusive_by is not None:
        raise PatchError(
            f"{job_table!r} has exclusive keys, and a find under a lease frees a row's key as soon "
            "as the legacy mark is written: leave out exclusive_by, or claim in place of the find"
        )
    table = job_table.entity or job_table.table
    unset: dict[str, Any] = dict.fromkeys(("free", "claimed", "failed", "released"), UNSET)
    unset |= {"null_is_free": False, "unleased": None}
    state, done = job_table.lease, job_table.claimed
    return replace(job_table, table=table, state=state, done=done, **unset)


def check_role(job_table: JobTable, role: str, option: str, given: Any) -> None:
    """Raise if an option is given that needs a column which the table does not have."""
    if given is None:
        return
    try:
        job_table.needed(role, f"{option}={given!r}")
    except ClaimError as error:
        raise PatchError(str(error)) from None


def _table_of(table: Any) -> sa.Table:
    mapper = mapper_of(table)
    found = tables_of(table)[0] if mapper is None else mapper.local_table
    assert isinstance(found, sa.Table)
    return found


def named(given: Any) -> Any:
    """Return what a string names: ``"module:Name"``, or a table by its name in the database."""
    if not isinstance(given, str):
        return given
    schema, _, name = given.rpartition(".")
    return Reference(given) if ":" in given else sa.table(name, schema=schema or None)


def _is_name(table: Any) -> bool:
    """Check whether it is the name of a table alone, whose columns have to be reflected."""
    return isinstance(table, sa.TableClause) and not isinstance(table, sa.Table)


def declared(table: Any, arguments: Mapping[str, Any]) -> Any:
    """Return the ``JobTable`` of a table whose columns are named beside it, if any are.

    ``"now()"`` is there the database's clock.

    Raises:
        ClaimError: the arguments do not fit the table.
    """
    if not arguments:
        return table
    if not isinstance(table, (type, sa.Table)):
        raise PatchError(
            f"table is {table!r}; expected a Table or a mapped class where its columns are named "
            "beside it"
        )
    return JobTable.infer(table, **_clocks(arguments))


def _reflected(clause: sa.TableClause, bind: Any) -> sa.Table:
    """Reflect a table, and leave the bind without a transaction if it has none."""
    if isinstance(bind, sessionmaker):
        with bind() as session:
            return _reflected(clause, session)
    if isinstance(bind, Session):
        begun = bind.in_transaction()
        bind = bind.connection({"clause": clause}) if begun else bind.get_bind(clause=clause)
    is_idle = isinstance(bind, sa.Connection) and not bind.in_transaction()
    try:
        return reflected(clause.name, clause.schema, bind, resolve_fks=False)
    except NoSuchTableError:
        raise PatchError(
            f"table={clause.fullname!r} is neither a parameter of the function nor a table in the "
            f"database {bind.engine.url.database!r}: write the table's name there, or "
            "'package.models:Job' for one that a module defines"
        ) from None
    finally:
        if is_idle:
            bind.rollback()


class Tables:
    """The table of each call of a patched function.

    Args:
        given: a table, the name of one, a path from a parameter, a callable, or a dictionary of
            the arguments of :meth:`JobTable.infer`.
        options: reads the options of the patch.
        make: makes of a table the ``JobTable`` of the patch, and raises if it does not fit.
    """

    def __init__(self, given: Any, options: Options, make: Callable[[Any], JobTable]) -> None:
        self._arguments: dict[str, Any] = {}
        if isinstance(given, Mapping):
            self._arguments = dict(given)
            given = self._arguments.pop("table", None)
        if isinstance(given, str) and options.parts(given) is None:
            given = named(given)
        self.reading = options.reading("table", given, lambda each: isinstance(each, type))
        self._make = make
        self._made: dict[Any, JobTable] = {}
        if isinstance(given, Reference):
            found = options.found(given)
            if isinstance(found, type) or not (found is None or callable(found)):
                self._of(found)
        elif self.reading.constant and not _is_name(given):
            self._of(given)

    def named(self, call: Call) -> sa.TableClause:
        """Return the table of a call, by its name alone if it has to be reflected."""
        given = self._read(call)
        return given if _is_name(given) else self._of(given).table  # type: ignore[no-any-return]

    def of(self, call: Call, bind: Any) -> JobTable:
        """Return the ``JobTable`` of a call, whose bind a table is reflected from.

        Raises:
            PatchError: there is nothing of that name.
        """
        given = self._read(call)
        if not _is_name(given) or given.fullname in self._made:
            return self._of(given)
        return self._of(given, _reflected(given, bind))

    def _read(self, call: Call) -> Any:
        given = named(self.reading.read(call))
        found = given.resolve() if isinstance(given, Reference) else given
        if found is None:
            raise PatchError(
                f"table={self.reading.given!r} is None: what sets it has not run; call it before "
                "the patched function"
            )
        return found

    def _of(self, given: Any, table: Any = None) -> JobTable:
        key = given.fullname if _is_name(given) else given
        if key not in self._made:
            made = self._make(declared(given if table is None else table, self._arguments))
            # Another thread may have been faster: all get the same one.
            self._made.setdefault(key, made)
        return self._made[key]


def _clocks(value: Any) -> Any:
    """Replace each ``"now()"`` by the database's clock."""
    if isinstance(value, Mapping):
        return {name: _clocks(each) for name, each in value.items()}
    return sa.func.now() if isinstance(value, str) and value == "now()" else value
