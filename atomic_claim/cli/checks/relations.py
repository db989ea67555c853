"""Foreign keys that point at the job table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import inspect
from sqlalchemy.engine.reflection import Inspector

from .findings import Finding, Level, Patient

CHECK = "foreign keys"
INNODB = ("mysql", "mariadb")


def foreign_keys(patient: Patient) -> Iterator[Finding]:
    """Report the tables that refer to jobs, and what that means for claims."""
    inspector = inspect(patient.connection)
    schema = patient.table.schema
    quiet = []
    for (own_schema, child), keys in inspector.get_multi_foreign_keys(schema=schema).items():
        for key in keys:
            same = key["referred_schema"] in (schema, None, inspector.default_schema_name)
            if key["referred_table"] != patient.table.name or not same:
                continue
            columns = key["constrained_columns"]
            said = f"{child} ({', '.join(columns)})"
            if action := key.get("options", {}).get("ondelete"):
                said += f" ON DELETE {action}"
            indexed = patient.product in INNODB or _is_indexed(
                inspector, child, own_schema, columns
            )
            if indexed and patient.product not in INNODB:
                quiet.append(said)
            else:
                yield _finding(patient, child, own_schema, columns, said)
    if quiet:
        yield Finding(CHECK, Level.FINE, f"{', '.join(quiet)}, with an index")


def _is_indexed(
    inspector: Inspector, child: str, schema: str | None, columns: Sequence[str]
) -> bool:
    """Check whether an index begins with these columns."""
    key = inspector.get_pk_constraint(child, schema=schema)["constrained_columns"]
    found: list[Sequence[Any]] = [key]
    for index in inspector.get_indexes(child, schema=schema):
        options = index.get("dialect_options", {})
        if not any(options.get(f"{name}_where") for name in ("postgresql", "sqlite")):
            found.append(index["column_names"])
    unique = inspector.get_unique_constraints(child, schema=schema)
    found += [each["column_names"] for each in unique]
    return any(set(each[: len(columns)]) == set(columns) for each in found)


def _finding(
    patient: Patient, child: str, schema: str | None, columns: Sequence[str], said: str
) -> Finding:
    if patient.product in INNODB:
        return Finding(
            CHECK,
            Level.NOTE,
            said,
            "an INSERT there locks its job until its transaction ends (it shares the lock, but "
            "not with a claim), and claims pass the job over so long",
            f"keep transactions that add to {child} short",
        )
    quoted = [patient.quoted(name) for name in columns]
    prefix = f"{patient.quoted(schema)}." if schema else ""
    name = patient.quoted(f"{child}_{'_'.join(columns)}")
    how = " CONCURRENTLY" if patient.product == "postgresql" else ""
    where = f"{prefix}{patient.quoted(child)}"
    if patient.product == "sqlite":
        name, where = prefix + name, patient.quoted(child)
    return Finding(
        CHECK,
        Level.NOTE,
        f"{said}, without an index",
        f"deleting a job, as clean-ups and some queues do, reads all of {child} each time; the "
        "claim itself minds no child",
        "index the column that refers to the job",
        (f"CREATE INDEX{how} {name} ON {where} ({', '.join(quoted)})",),
    )
