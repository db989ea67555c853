"""Import objects by ``MODULE:NAME``."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import NoSuchTableError

from atomic_claim.patch.tables import declared
from atomic_claim.references import reflected, resolve

from .database import CommandError

TableName = str | Mapping[str, Any]


def load(spec: str, parameter: str) -> Any:
    """Load the object that ``MODULE:NAME`` names, also from the current directory.

    Args:
        spec: the module and the name in it, which may have dots.
        parameter: where it was given, for the messages.

    Raises:
        CommandError: there is no such module or name, or the module cannot be imported.
    """
    return owner_and_object(spec, parameter)[1]


def load_table(spec: TableName, bind: Engine | Connection | None) -> Any:
    """Load the table of a module, or reflect that of this name from the database.

    Args:
        spec: ``MODULE:NAME``, or the table's name, with a dot behind its schema; or, as in a file
            of patches, the arguments of ``JobTable.infer``, where ``table`` is such a name.
        bind: the database, if there is one.

    Raises:
        CommandError: there is none of this name.
        ClaimError: the arguments do not fit the table.
    """
    if isinstance(spec, Mapping):
        arguments = dict(spec)
        return declared(load_table(arguments.pop("table"), bind), arguments)
    if ":" in spec:
        return load(spec, "table")
    if bind is None:
        raise CommandError(f"table={spec} is a name in a database: give url=, or write MODULE:NAME")
    schema, _, name = spec.rpartition(".")
    try:
        return reflected(name, schema or None, bind)
    except NoSuchTableError:
        raise CommandError(
            f"table={spec}: the database has no such table; expected its name, or MODULE:NAME "
            "for a table that a module declares"
        ) from None


def owner_and_object(spec: str, parameter: str) -> tuple[Any, Any]:
    """Load an object as :func:`load` does; return its module or class, and the object."""
    module_name, colon, name = spec.partition(":")
    if not (module_name and colon and name):
        raise CommandError(
            f"{parameter}={spec}: expected MODULE:NAME, such as app.models:Job, where "
            "app/models.py lies in the current directory or is installed"
        )
    if (here := os.getcwd()) not in sys.path:  # noqa: PTH109 - sys.path holds strings
        sys.path.insert(0, here)
    _import(module_name, f"{parameter}={spec}")
    above, _, last = name.rpartition(".")
    try:
        owner = resolve(f"{module_name}:{above}")
        return owner, getattr(owner, last)
    except (AttributeError, ValueError):
        raise CommandError(
            f"{parameter}={spec}: the module {module_name!r} has no {name!r}"
        ) from None


def _import(name: str, said: str) -> None:
    try:
        import_module(name)
    # Whatever a module does when it is imported, its author reads one line of it.
    except Exception as error:  # noqa: BLE001
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        # A package that the user's module needs is another trouble.
        if missing is not None and f"{name}.".startswith(f"{missing}."):
            raise CommandError(
                f"{said}: there is no module {name!r}, in the current directory or installed"
            ) from None
        raise CommandError(f"{said}: {where(error)}") from None


def where(error: BaseException) -> str:
    """Describe an error and the line in the user's code that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    said = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__} at {last.filename}:{last.lineno}: {said}"
