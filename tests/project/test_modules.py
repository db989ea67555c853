"""The modules import each other in one direction, and only the packages listed for each."""

import ast
import subprocess
import sys
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

import atomic_claim
from atomic_claim import aio

pytestmark = pytest.mark.once

PACKAGE = Path(atomic_claim.__file__).parent
# From the ground up: each imports only from those before it. A package counts as one room.
ROOMS = [
    "errors",
    "files",
    "references",
    "orm",
    "sql_elements",
    "columns",
    "inference",
    "roles",
    "state_values",
    "layouts",
    "job_table",
    "tickets",
    "predicates",
    "outcomes",
    "arguments",
    "candidates",
    "plan",
    "statement",
    "backends",
    "guard",
    "telemetry",
    "opentelemetry",
    "execution",
    "claim",
    "lifecycle",
    "heartbeat",
    "patch",
    "aio",
    "testing",
    "__init__",
    "cli",
    "__main__",
]
# What is installed beside the package; only `patch` may import wrapt.
PEERS = {
    "files": set[str](),
    "patch": {"sqlalchemy", "wrapt"},
    "opentelemetry": {"opentelemetry", "sqlalchemy"},
    "cli": {"alembic", "matplotlib", "rich", "sqlalchemy", "typer"},
}


def module_names() -> dict[str, Path]:
    """Every module of the package by its name below it."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        found[name] = path
    return found


MODULES = module_names()


def imported(source: str, package: str) -> set[str]:
    """Return the full names of all imports in a module of this package, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level]
            base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def imports_of(name: str) -> set[str]:
    """Return the full names of everything that a module imports."""
    path = MODULES[name]
    package = ".".join(["atomic_claim", *path.relative_to(PACKAGE).parts[:-1]])
    return imported(path.read_text(encoding="utf-8"), package)


def own_module(full_name: str) -> str | None:
    """Return the package's module that defines an imported name, or None if it is external."""
    first, *parts = full_name.split(".")
    if first != "atomic_claim":
        return None
    while parts and ".".join(parts) not in MODULES:
        parts.pop()
    return ".".join(parts) or "__init__"


def room(name: str) -> str:
    """Return the room that a module is in."""
    return name.partition(".")[0]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import atomic_claim.errors as e", {"errors"}),
        ("from atomic_claim import claim_jobs", {"__init__"}),
        ("from .errors import ClaimError", {"backends"}),
        ("from .base import Transaction", {"backends.base"}),
        ("from . import base", {"backends.base"}),
        ("from .. import claim, Claim", {"claim", "__init__"}),
        ("from ..claim import Claim", {"claim"}),
        ("def later():\n    from atomic_claim.lifecycle import _change", {"lifecycle"}),
        ("import sqlalchemy.orm", {None}),
    ],
)
def test_imports_are_read_right(source: str, expected: set[str | None]) -> None:
    """Every way to import is seen, inside functions too, as from a module of `backends`."""
    assert {own_module(name) for name in imported(source, "atomic_claim.backends")} == expected


def test_every_module_has_its_room() -> None:
    """A new module has to be given its place in the order."""
    assert {room(name) for name in MODULES} <= set(ROOMS)


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_one_way(name: str) -> None:
    """A module imports only from rooms before its own."""
    found = {room(own) for full in imports_of(name) if (own := own_module(full)) is not None}
    here = room(name)
    assert found - {here} <= set(ROOMS[: ROOMS.index(here)])


@pytest.mark.parametrize("package", ["files", "backends", "testing", "cli"])
def test_imports_within_a_room_go_one_way(package: str) -> None:
    """Nor do the modules of one room import each other in a circle."""
    graph = defaultdict(set)
    for name in MODULES:
        if room(name) == package:
            graph[name] = {
                own
                for full in imports_of(name)
                if (own := own_module(full)) not in {None, name} and room(own or "") == package
            }
    assert len(graph) > 1
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("name", MODULES)
def test_peers_are_imported_where_they_belong(name: str) -> None:
    """No module imports a driver; wrapt is `patch`'s, Alembic and what draws the CLI's."""
    found = {full.partition(".")[0] for full in imports_of(name)} - {"atomic_claim"}
    assert found - sys.stdlib_module_names <= PEERS.get(room(name), {"sqlalchemy"})


def test_sqlite3_is_imported_by_its_dialect_alone() -> None:
    """The one driver that comes with Python is asked of by the strategy that needs it."""
    found = [name for name in MODULES if "sqlite3" in imports_of(name) and room(name) != "cli"]
    assert found == ["backends.sqlite"]


def public_names(module: ModuleType) -> list[str]:
    """Return the public names of a module, except modules."""
    return sorted(
        name
        for name in dir(module)
        if not name.startswith("_") and not isinstance(getattr(module, name), ModuleType)
    )


def test_all_is_sorted_and_complete() -> None:
    """The package offers what it lists, in order."""
    assert public_names(atomic_claim) == atomic_claim.__all__


def test_the_asynchronous_names_are_the_same() -> None:
    """`aio` lists all of its functions, and each has its synchronous twin."""
    own = [
        name
        for name in public_names(aio)
        if isinstance(value := getattr(aio, name), FunctionType)
        and value.__module__ == aio.__name__
    ]
    assert own == aio.__all__
    assert set(own) <= set(atomic_claim.__all__)


def loaded_by(statement: str) -> set[str]:
    """Return the top-level modules that a statement loads in a fresh interpreter."""
    program = (
        f"import sys; before = set(sys.modules); {statement}; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    return set(done.stdout.split())


def test_importing_loads_no_driver() -> None:
    """Nothing is loaded but SQLAlchemy, what that needs, and Python's own modules."""
    found = loaded_by("import atomic_claim") - sys.stdlib_module_names
    # Python's `_sysconfigdata…` has no fixed name, and SQLAlchemy brings modules of Cython's.
    others = {name for name in found if "cython" not in name and not name.startswith("_")}
    assert others - {"greenlet"} == {"atomic_claim", "sqlalchemy", "typing_extensions"}


@pytest.mark.parametrize(
    "statement",
    [
        "from atomic_claim import patch_claims",
        "from atomic_claim import *; patch_claims, Patch, claims, lock_reads, claim_reads",
        "import atomic_claim; atomic_claim.Patch",
    ],
)
def test_what_patches_is_loaded_when_it_is_asked_for(statement: str) -> None:
    """The twin: wrapt comes with the first name that needs it, however that is imported."""
    assert "wrapt" in loaded_by(statement)


def test_the_names_that_are_yet_to_be_loaded_are_listed() -> None:
    """`dir()` has them before anybody asks for one, and a name that is none is an error."""
    program = (
        "import sys, atomic_claim; assert set(atomic_claim.__all__) <= set(dir(atomic_claim)); "
        "assert 'wrapt' not in sys.modules; atomic_claim.patch_claim"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert done.stderr.splitlines()[-1].startswith(
        "AttributeError: module 'atomic_claim' has no attribute 'patch_claim'"
    )


def test_a_loaded_driver_would_be_seen() -> None:
    """The twin: what an engine loads is among what is counted."""
    found = loaded_by("import sqlalchemy; sqlalchemy.create_engine('postgresql+psycopg://')")
    assert "psycopg" in found - sys.stdlib_module_names
