"""A file of patches, for a program whose source stays as it is."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields
from inspect import signature
from pathlib import Path
from typing import Any

from atomic_claim.errors import PatchError
from atomic_claim.job_table import JobTable

from .calls import Reference
from .claimed_reads import claim_reads
from .claiming import patch_claims
from .locking import lock_reads
from .main_module import MissingModule
from .options import NAMES
from .patches import Patch
from .targets import parts_of

SECTION = "tool.atomic_claim.patches"
REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
TABLE = re.compile(r"[^\s:]+|" + REFERENCE.pattern)
MAKERS: Mapping[str, tuple[Callable[..., Patch], frozenset[str]]] = {
    "patch_claims": (patch_claims, NAMES | {"table"}),
    "lock_reads": (lock_reads, frozenset(signature(lock_reads).parameters) - {"target"}),
    "claim_reads": (claim_reads, frozenset(signature(claim_reads).parameters) - {"target"}),
}
"""What makes a patch, and its options."""
# What is text, and never the name of an object.
TEXTS = frozenset({"table", "worker", "target", "by", "pattern", "layout", "ignore"})
TABLE_OPTIONS = frozenset(field.name for field in fields(JobTable) if field.init)


@dataclass(frozen=True)
class Entry:
    """One patch of a file: what makes it, of what, and how."""

    by: str
    target: str
    options: Mapping[str, Any]

    def apply(self) -> Patch:
        """Make the patch."""
        options = {name: _option(name, value) for name, value in self.options.items()}
        return MAKERS[self.by][0](self.target, **options)


def find_file(folder: Path) -> Path | None:
    """Return the nearest ``pyproject.toml`` with patches in a folder or its parents."""
    for each in (folder, *folder.parents):
        path = each / "pyproject.toml"
        if path.is_file() and _section(_parsed(path)) is not None:
            return path
    return None


def read_file(path: Path) -> list[Entry]:
    """Read the patches of a file, validated as far as possible without importing anything.

    .. code-block:: toml

        [tool.atomic_claim.patches."legacy_app.jobs:Repository.claim_batch"]
        table = "legacy_app.models:Job"
        session = "self.session"
        limit = "limit"

        [tool.atomic_claim.patches."legacy_app.relay:relay"]
        by = "lock_reads"
        table = "legacy_app.models:Event"

    Each table is named after its target and holds the arguments of :func:`patch_claims`, or of what
    ``by`` names. ``"module:name"`` stands for an object. ``table`` may be a table itself, of the
    arguments of :meth:`JobTable.infer`, in which ``"now()"`` is the database's clock; what they
    leave out is read from the columns' names. In a file that is not ``pyproject.toml``,
    ``[patches]`` will do.

    Raises:
        PatchError: the file cannot be read, or says what no patch can be made of.
    """
    section = _section(_parsed(path))
    if section is None:
        raise PatchError(f'{path} has no [{SECTION}."package.module:function"]: write one')
    if not isinstance(section, dict) or not section:
        raise PatchError(
            f"[{SECTION}] of {path} holds no patch; write one as "
            f'[{SECTION}."package.module:function"]'
        )
    return [_entry(path, target, given) for target, given in section.items()]


def load_patches(path: Path | str, *, skip_missing: bool = False) -> list[Patch]:
    """Make all patches of a file; see :func:`read_file`.

    Args:
        path: the file.
        skip_missing: leave out what is in packages that are not there, as in a process which is
            none of the program's own.

    Raises:
        PatchError: a patch cannot be made; those before it are undone.
    """
    made: list[Patch] = []
    with ExitStack() as undoing:
        for entry in read_file(Path(path)):
            try:
                made.append(undoing.enter_context(entry.apply()))
            except MissingModule:
                if not skip_missing:
                    raise
        undoing.pop_all()
    return made


def _parsed(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise PatchError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PatchError(f"{path} is not TOML: {error}") from error


def _section(parsed: Mapping[str, Any]) -> Any:
    found: Any = parsed
    for part in SECTION.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return parsed.get("patches") if found is None else found


def _entry(path: Path, target: str, given: Any) -> Entry:
    where = f'[{SECTION}."{target}"] of {path}'
    if not isinstance(given, dict):
        raise PatchError(f"{where} is {given!r}; expected a table of options")
    parts_of(target)
    by = given.get("by", "patch_claims")
    if by not in MAKERS:
        raise PatchError(f"{where}: by={by!r}; expected one of {', '.join(MAKERS)}")
    options = {name: value for name, value in given.items() if name != "by"}
    _check_names(where, options, MAKERS[by][1])
    table = options.get("table")
    if isinstance(table, dict):
        _check_names(f"table of {where}", table, TABLE_OPTIONS)
        table = table.get("table")
    of_files = by == "patch_claims" and "directory" in options and "table" not in options
    if not (of_files or (isinstance(table, str) and TABLE.fullmatch(table))):
        raise PatchError(
            f"{where}: table is {table!r}; expected 'package.models:Job', or a path from a "
            "parameter, or a name in the database"
        )
    return Entry(by, target, options)


def _check_names(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    if unknown := sorted(set(given).difference(known)):
        raise PatchError(
            f"{where} has {', '.join(map(repr, unknown))}; expected {', '.join(sorted(known))}"
        )


def _option(name: str, value: Any) -> Any:
    """Convert an option to what a call would pass: objects in place of their names."""
    is_name = isinstance(value, str) and name not in TEXTS and REFERENCE.fullmatch(value)
    return Reference(value) if is_name else value
