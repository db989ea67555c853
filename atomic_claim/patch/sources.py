"""The names that a module will define, read from its source before it is imported."""

from __future__ import annotations

import ast
import difflib
import sys
from collections.abc import Iterable, Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from atomic_claim.errors import PatchError

from .main_module import is_main


class MissingModule(PatchError):
    """The module of a target cannot be imported."""


def check_source(module: str, path: str) -> None:
    """Refuse a target that cannot be there, as far as that shows without importing anything.

    Raises:
        MissingModule: there is no such module.
        PatchError: its source defines no such name, nor could take it from elsewhere.
    """
    first = sys.argv[0] if sys.argv else ""
    if is_main(module) and first not in {"", "-c", "-m"}:
        source = Path(first)
    else:
        spec = _spec(module)
        if spec is None:
            raise MissingModule(
                f"there is no module {module!r} on this Python's path, so {module}:{path} can "
                "never be patched"
            )
        if is_main(module) and spec.submodule_search_locations:
            spec = _spec(f"{module}.__main__") or spec
        source = Path(spec.origin or "")
    if source.suffix == ".py" and source.is_file():
        _check(source, module, path)


def _spec(module: str) -> ModuleSpec | None:
    """Where a module would be imported from; its packages are not imported for it."""
    found: ModuleSpec | None = None
    above: Iterable[str] | None = None
    names = module.split(".")
    for depth, _ in enumerate(names, 1):
        name = ".".join(names[:depth])
        loaded = sys.modules.get(name)
        if loaded is not None and hasattr(loaded, "__path__"):
            # Some packages put an object of their own in their place, which has no __spec__.
            above = loaded.__path__
            found = ModuleSpec(name, None, is_package=True)
            continue
        found = _find(name, above)
        if found is None:
            return None
        above = found.submodule_search_locations
    return found


def _find(name: str, above: Iterable[str] | None) -> ModuleSpec | None:
    """Ask every finder, since an editable installation brings its own."""
    path = None if above is None else list(above)
    for finder in (PathFinder, *sys.meta_path):
        find = getattr(finder, "find_spec", None)
        if find is not None and (found := find(name, path)) is not None:
            return found  # type: ignore[no-any-return]
    return None


def _check(source: Path, module: str, path: str) -> None:
    try:
        body = ast.parse(source.read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        # Whoever imports it will hear of that.
        return
    for part in path.split("."):
        names = dict(_defined(body))
        if "*" in names or "__getattr__" in names:
            return
        if part not in names:
            similar = difflib.get_close_matches(part, names, n=3)
            hint = f"; did you mean {' or '.join(map(repr, similar))}?" if similar else ""
            raise PatchError(f"{module}:{path} does not exist: {source} defines no {part!r}{hint}")
        node = names[part]
        if not isinstance(node, ast.ClassDef) or node.bases or node.decorator_list:
            return
        body = node.body


def _defined(body: Iterable[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    """Yield the names that statements define, with the statement; ``*`` stands for any name."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (((each.asname or each.name).partition(".")[0], node) for each in node.names)
        else:
            for inner in ast.walk(node):
                if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                    yield inner.id, node
                # globals()[...] = and exec() can define whatever they like.
                if isinstance(inner, ast.Name) and inner.id in {"globals", "exec", "setattr"}:
                    yield "*", node
            for field in ("body", "orelse", "finalbody", "handlers"):
                for child in getattr(node, field, ()):
                    inner_body = child.body if isinstance(child, ast.ExceptHandler) else [child]
                    yield from _defined(inner_body)
