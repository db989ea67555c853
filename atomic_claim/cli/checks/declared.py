"""The columns that a claim uses: their types and values beside those of the database."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import Column, MetaData, String, Table, case, cast, func, or_, select
from sqlalchemy.dialects import mysql
from sqlalchemy.sql import visitors
from sqlalchemy.types import Enum

from atomic_claim.inference import is_flag, is_text, plain_type
from atomic_claim.job_table import JobTable
from atomic_claim.sql_elements import InlineLiteral

from .findings import Finding, Level, Patient, Reading, count, listed
from .rows import update_text

INNODB = ("mysql", "mariadb")
TYPES = "types of the columns"
STATES = "values of the state"
# The first word of a type, and what it is compared as; a type of another word is passed over.
FAMILIES = {
    **dict.fromkeys(("INTEGER", "INT", "BIGINT", "SMALLINT", "MEDIUMINT", "SERIAL"), "integer"),
    **dict.fromkeys(("BOOL", "BOOLEAN", "TINYINT"), "boolean"),
    **dict.fromkeys(("VARCHAR", "CHAR", "TEXT", "LONGTEXT", "MEDIUMTEXT", "TINYTEXT"), "text"),
    **dict.fromkeys(("DATETIME", "TIMESTAMP"), "time"),
    "DATE": "date",
    "UUID": "uuid",
}
# Where two families are stored and compared alike.
ALIKE = {
    "postgresql": (),
    "sqlite": ({"integer", "boolean"}, {"text", "time", "date", "uuid"}),
    "mysql": ({"integer", "boolean"},),
    "mariadb": ({"integer", "boolean"},),
}
MOST_VALUES = 50


def types(reading: Reading) -> Iterator[Finding]:
    """Compare the types, lengths, members and nullability of the columns that a claim uses."""
    patient, own = reading.patient, reading.job_table
    table = patient.table
    stored = Table(table.name, MetaData(), schema=table.schema, autoload_with=patient.connection)
    keys = (own.exclusive_by, own.fair_by)
    used = [*own.key, *reading.written, own.due, own.max_attempts, own.error, *keys]
    found = []
    for column in dict.fromkeys(each for each in used if isinstance(each, Column)):
        real = stored.columns.get(column.name)
        if real is None:
            continue
        if said := _difference(patient, column, real):
            found.append(said)
            yield _differs(reading, column, real, said)
        # SQLite has a key that may be NULL, by its own old error.
        elif bool(column.nullable) != bool(real.nullable) and not column.primary_key:
            found.append(column.name)
            yield _nullability(reading, column, real)
    if not found:
        yield Finding(TYPES, Level.FINE, "as they are declared")


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


def _family(patient: Patient, type_: Any) -> str | None:
    if isinstance(type_, Enum) and type_.native_enum and patient.product == "postgresql":
        return "enum"
    if isinstance(type_, (Enum, mysql.ENUM)):
        return "text"
    said = _text(patient, type_).upper()
    if patient.product == "postgresql" and said.endswith("WITH TIME ZONE"):
        return "time with a zone"
    word = re.match(r"\w+", said)
    return FAMILIES.get(word[0]) if word else None


def _altered(
    patient: Patient, column: Column[Any], real: Column[Any], *, type_: Any, null: bool
) -> tuple[str, ...]:
    """Return the statements that give a stored column the type and nullability."""
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
        kind = patient.quoted(str(real.type.name))
        new = [each for each in type_.enums if each not in real.type.enums]
        return tuple(f"ALTER TYPE {kind} ADD VALUE '{each}'" for each in new)
    using = f"{name}::{said}"
    if {_family(patient, real.type), _family(patient, type_)} == {"integer", "boolean"}:
        using = f"{name}::integer::{said}"
    found.append(f"{alter} TYPE {said} USING {using}")
    if (default := getattr(real.server_default, "arg", None)) is None:
        return tuple(found)
    # A default of the former type cannot be cast with the column.
    plain = re.sub(r"::[\w ]+$", "", str(default))
    return (f"{alter} DROP DEFAULT", *found, f"{alter} SET DEFAULT {plain}")


def _differs(reading: Reading, column: Column[Any], real: Column[Any], said: str) -> Finding:
    patient = reading.patient
    sql = _altered(patient, column, real, type_=plain_type(column.type), null=bool(column.nullable))
    return Finding(
        TYPES,
        Level.PROBLEM,
        said,
        "a claim compares and writes what is declared: the database refuses it, cuts it, or finds "
        "no row by it",
        "declare what the database has, or change the column (the table is locked so long):"
        if sql
        else "declare what the database has, or create the table again (batch_alter_table)",
        sql,
    )


def _nullability(reading: Reading, column: Column[Any], real: Column[Any]) -> Finding:
    """Report a NOT NULL that only one side has: a problem where a claim has to write NULL."""
    own, patient = reading.job_table, reading.patient
    cleared = {own.lease, own.token, own.worker}
    cleared |= {c for marks in (own.released, own.done) for c, v in marks.items() if v is None}
    lost = not real.nullable and column in cleared
    sides = ("NULL", "NOT NULL") if real.nullable else ("NOT NULL", "NULL")
    sql = _altered(patient, column, real, type_=real.type, null=bool(column.nullable))
    return Finding(
        TYPES,
        Level.PROBLEM if lost else Level.NOTE,
        f"{column.name} is {sides[0]}, declared {sides[1]}",
        "the end of a job writes NULL there, and the database refuses or replaces it"
        if lost
        else "the conditions of a claim are made for what is declared",
        "declare what the database has, or change the column:"
        if sql
        else "declare what the database has, or create the table again (batch_alter_table)",
        sql,
    )


def states(reading: Reading) -> Iterator[Finding]:
    """Count the rows of each state, and name the values that have no meaning."""
    own, patient = reading.job_table, reading.patient
    state = own.state
    known = _known(patient, own)
    if state is None or not known or is_flag(state):
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
    rows = list(patient.connection.execute(statement))
    said = ", ".join(f"{value}: {number:,}" for value, number, *_ in rows)
    strange = [(str(value), number) for value, number, is_known, _ in rows if not is_known]
    if not strange:
        yield Finding(STATES, Level.FINE, said or "no rows")
        return
    waiting = any(is_free for *_, is_free in rows)
    for value, number in strange:
        near = [text for text in known if text.casefold() == value.strip().casefold()]
        yield _strange(patient, state, (value, number), [known[text] for text in near], waiting)


def _known(patient: Patient, job_table: JobTable) -> dict[str, InlineLiteral]:
    """Return the values of the state that the declaration names, by the text that is stored."""
    state = job_table.state
    if state is None:
        return {}
    marks: Sequence[Any] = [
        mark.get(state)
        for mark in (job_table.claimed, job_table.done, job_table.failed, job_table.released)
    ]
    found = [*marks, *visitors.iterate(job_table.free)]
    return {
        patient.text(each).strip("'").replace("''", "'"): each
        for each in found
        if isinstance(each, InlineLiteral) and each.type is state.type
    }


def _strange(
    patient: Patient,
    state: Column[Any],
    value: tuple[str, int],
    near: Sequence[InlineLiteral],
    waiting: bool,
) -> Finding:
    text, number = value
    sql: tuple[str, ...] = ()
    fix = f"say what {text!r} means in the JobTable, if it waits: free=(..., {text!r})"
    if near:
        fix = "if that is a misspelling, correct it:"
        literal = patient.text(InlineLiteral(text, String()))
        sql = (update_text(patient, {state: near[0]}, f"{patient.quoted(state.name)} = {literal}"),)
    why = "no claim ever takes a row whose state is none of the declared values"
    if not waiting:
        why += ", and no row has a value that is free"
    level = Level.NOTE if waiting and not near else Level.PROBLEM
    return Finding(STATES, level, f"{count(number)} with {text!r}", why, fix, sql)
