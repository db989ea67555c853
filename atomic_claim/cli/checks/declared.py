"""The columns that a claim uses: their types and values beside those of the database."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import date, datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Column, MetaData, String, Table, case, cast, func, or_, select
from sqlalchemy.sql import visitors
from sqlalchemy.types import Enum

from atomic_claim.cli.indexes import INNODB
from atomic_claim.inference import is_flag, is_text, plain_type
from atomic_claim.sql_elements import InlineLiteral

from .catalog import finding
from .findings import Finding, Level, Patient, Reading, count, listed
from .rows import update_text

# What is compared of a type is its values' type in Python, if it is one of these.
COMPARED = {int, bool, str, datetime, date, UUID}
# Where two of them are stored and compared alike.
ALIKE: Mapping[str, tuple[set[Any], ...]] = {
    "postgresql": (),
    "sqlite": ({int, bool}, {str, datetime, date, UUID}),
    **dict.fromkeys(INNODB, ({int, bool}, {str, UUID})),
}
MOST_VALUES = 50


def types(reading: Reading) -> Iterator[Finding]:
    """Compare the types, lengths, members and nullability of the columns that a claim uses."""
    own, table = reading.job_table, reading.table
    stored = Table(table.name, MetaData(), schema=table.schema, autoload_with=reading.connection)
    keys = (own.exclusive_by, own.fair_by)
    used = [*own.key, *reading.written, own.due, own.max_attempts, own.error, *keys]
    found = [
        finding
        for column in dict.fromkeys(each for each in used if isinstance(each, Column))
        if (real := stored.columns.get(column.name)) is not None
        and (finding := _compared(reading, column, real)) is not None
    ]
    yield from found or [Finding("types of the columns", Level.FINE, "as they are declared")]


def _compared(reading: Reading, column: Column[Any], real: Column[Any]) -> Finding | None:
    """Compare a declared column with the stored one; its type first, then NOT NULL."""
    own = reading.job_table
    said, type_ = _difference(reading, column, real), plain_type(column.type)
    key, how = "other_type", "the column (the table is locked so long)"
    if said is None:
        # SQLite has a key that may be NULL, by its own old error.
        if bool(column.nullable) == bool(real.nullable) or column.primary_key:
            return None
        stored, wanted = ("NULL", "NOT NULL") if real.nullable else ("NOT NULL", "NULL")
        said, type_, how = f"{column.name} is {stored}, declared {wanted}", real.type, "the column"
        cleared = {own.lease, own.token, own.worker}
        cleared |= {c for marks in (own.released, own.done) for c, v in marks.items() if v is None}
        key = "other_null" if real.nullable or column not in cleared else "not_null"
    sql = _altered(reading, column, real, type_)
    change = f"change {how}:" if sql else "create the table again (batch_alter_table)"
    return finding(key, sql, found=said, change=change)


def _difference(patient: Patient, column: Column[Any], real: Column[Any]) -> str | None:
    """Return what differs between the types of a declared column and the stored one."""
    declared, stored = plain_type(column.type), plain_type(real.type)
    if isinstance(declared, Enum) and isinstance(stored, Enum):
        missing = [each for each in declared.enums if each not in stored.enums]
        return f"{column.name} lacks {listed(missing)}" if missing else None
    here, there = (_family(patient, each) for each in (declared, stored))
    alike = any({here, there} <= each for each in ALIKE[patient.product])
    if None not in (here, there) and here != there and not alike:
        return f"{column.name} is {_text(patient, stored)}, declared as {_text(patient, declared)}"
    longest = [getattr(each, "length", None) or 0 for each in (declared, stored)]
    # SQLite cuts nothing.
    if patient.product != "sqlite" and is_text(column) and longest[0] > longest[1] > 0:
        return f"{column.name} has {longest[1]} characters, declared with {longest[0]}"
    return None


def _text(patient: Patient, type_: Any) -> str:
    return str(patient.dialect.type_compiler_instance.process(type_))


def _family(patient: Patient, type_: Any) -> Any:
    if patient.product == "postgresql" and isinstance(type_, Enum) and type_.native_enum:
        return Enum
    if patient.product == "postgresql" and getattr(type_, "timezone", False):
        return "time with a zone"
    try:
        found = str if isinstance(type_, Enum) else type_.python_type
    except NotImplementedError:
        return None
    return found if found in COMPARED else None


def _altered(
    patient: Patient, column: Column[Any], real: Column[Any], type_: Any
) -> tuple[str, ...]:
    """Return the statements that give a stored column the type and the declared nullability."""
    null = bool(column.nullable)
    name, said = patient.quoted(column.name), _text(patient, type_)
    if patient.product == "sqlite":
        return ()
    if patient.product in INNODB:
        default = getattr(real.server_default, "arg", None)
        kept = "" if default is None else f" DEFAULT {default}"
        word = "NULL" if null else "NOT NULL"
        return (f"ALTER TABLE {patient.name} MODIFY {name} {said} {word}{kept}",)
    alter = f"ALTER TABLE {patient.name} ALTER COLUMN {name}"
    found = [f"{alter} {'DROP' if null else 'SET'} NOT NULL"] if null != real.nullable else []
    if type_ is real.type:
        return tuple(found)
    if isinstance(type_, Enum) and isinstance(real.type, Enum):
        kind = _text(patient, real.type)
        new = [each for each in type_.enums if each not in real.type.enums]
        values = (patient.text(InlineLiteral(each, String())) for each in new)
        return tuple(f"ALTER TYPE {kind} ADD VALUE {value}" for value in values)
    using = f"{name}::{said}"
    if {_family(patient, real.type), _family(patient, type_)} == {int, bool}:
        using = f"{name}::integer::{said}"
    found.append(f"{alter} TYPE {said} USING {using}")
    if (default := getattr(real.server_default, "arg", None)) is None:
        return tuple(found)
    # A default of the former type cannot be cast with the column.
    plain = re.sub(r"::[\w ]+$", "", str(default))
    return (f"{alter} DROP DEFAULT", *found, f"{alter} SET DEFAULT {plain}")


def states(reading: Reading) -> Iterator[Finding]:
    """Count the rows of each state, and name the values that have no meaning."""
    own, state = reading.job_table, reading.job_table.state
    if state is None or is_flag(state) or not (known := _known(reading, state)):
        return
    meant = or_(*(state == value for value in known.values()))
    statement = (
        select(
            cast(state, String(255)),
            func.count(),
            func.max(case((meant, 1), else_=0)),
            func.max(case((own.free, 1), else_=0)),
        )
        .where(state.is_not(None))
        .group_by(state)
        .limit(MOST_VALUES)
    )
    rows = list(reading.connection.execute(statement))
    said = ", ".join(f"{value}: {number:,}" for value, number, *_ in rows)
    strange = [(str(value), number) for value, number, is_known, _ in rows if not is_known]
    if not strange:
        yield Finding("values of the state", Level.FINE, said or "no rows")
        return
    waiting = any(is_free for *_, is_free in rows)
    for value, number in strange:
        words = {"rows": count(number), "text": value}
        near = [text for text in known if text.casefold() == value.strip().casefold()]
        if near:
            where = state == InlineLiteral(value, String())
            sql = update_text(reading, {state: known[near[0]]}, reading.text(where))
            yield finding("misspelt_state", (sql,), **words)
        else:
            yield finding("strange_state" if waiting else "no_free_state", **words)


def _known(reading: Reading, state: Column[Any]) -> dict[str, InlineLiteral]:
    """Return the values of the state that the declaration names, by the text that is stored."""
    own = reading.job_table
    marks = [mark.get(state) for mark in (own.claimed, own.done, own.failed, own.released)]
    return {
        reading.text(each).strip("'").replace("''", "'"): each
        for each in (*marks, *visitors.iterate(own.free))
        if isinstance(each, InlineLiteral) and each.type is state.type
    }
