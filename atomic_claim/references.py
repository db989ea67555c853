"""References by name: ``"package.module:Class.attribute"``, and tables of the database."""

from __future__ import annotations

import warnings
from pkgutil import resolve_name
from typing import Any

from sqlalchemy import MetaData, Table
from sqlalchemy.exc import SAWarning


def resolve(reference: str) -> Any:
    """Return the object that ``"module:name"`` names; import the module if necessary.

    Args:
        reference: the module and the name in it, which may have dots; ``"module:"`` is the module.

    Raises:
        ValueError: it has another form.
        ImportError: there is no such module, or it cannot be imported.
        AttributeError: the module has nothing of that name.
    """
    if ":" not in reference:
        raise ValueError(f"{reference!r} is not a reference; expected 'package.module:name'")
    return resolve_name(reference)


def reflected(name: str, schema: str | None, bind: Any, **options: Any) -> Table:
    """Reflect a table from an engine or a connection; the options are those of ``Table``.

    Raises:
        NoSuchTableError: the database has none of this name.
    """
    with warnings.catch_warnings():
        # An index on an expression cannot be reflected, and is not needed.
        warnings.simplefilter("ignore", SAWarning)
        return Table(name, MetaData(), schema=schema, autoload_with=bind, **options)
