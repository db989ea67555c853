"""References to objects by name, ``"package.module:Class.attribute"``."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Any


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
