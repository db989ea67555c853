"""Read a program's source for messages; no behaviour depends on it."""

from __future__ import annotations

import ast
import difflib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

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


def source_of(function: Callable[..., Any]) -> ast.Module:
    """Return the parsed source of a function; an empty one if it is unavailable."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return ast.Module([], [])


def commit_note(function: Callable[..., Any]) -> str:
    """Propose what to say for ``commit=``, and name the line that it was read from."""
    for node in ast.walk(source_of(function)):
        name = _name(node.func) if isinstance(node, ast.Call) else ""
        if isinstance(node, ast.Call) and ("commit" in name.lower() or name == "begin"):
            return f"commit=True, since it commits (line {node.lineno} of it: {_code(node)})"
    return (
        "commit=True if it or what it calls commits, else commit=False, since its source shows no "
        "commit"
    )


def yield_notes(function: Callable[..., Any]) -> Iterator[str]:
    """Yield what a generator does beside yielding jobs, which a claim in its place leaves out."""
    tree = source_of(function)
    yields = [node for node in ast.walk(tree) if isinstance(node, ast.Yield | ast.YieldFrom)]
    # `yield None` is what a context manager does that found nothing.
    jobs = [node for node in yields if not isinstance(node.value, ast.Constant | None)]
    first = min((node.end_lineno or node.lineno for node in jobs), default=sys.maxsize)
    marks = [(node.lineno, _code(node)) for _, node in writes_of(tree) if node.lineno > first]
    if marks:
        line, code = min(marks)
        yield (
            f"goes on after its yield (line {line} of it: {code}), which a claim in its place "
            "leaves out: have it run as it is, over claimed rows, by claim_reads()"
        )
    leaves = (ast.Return, ast.Break, ast.Raise)
    for node in ast.walk(tree):
        if not isinstance(node, ast.While) or not isinstance(node.test, ast.Constant):
            continue
        if not any(isinstance(each, leaves) for each in ast.walk(node)):
            yield (
                f"never ends by itself (line {node.lineno} of it), and a claim in its place ends "
                "when no job is left: patch the function that it finds one job by, or have it run "
                "as it is, over claimed rows, by claim_reads()"
            )


def writes_of(tree: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Yield the attributes and columns that a function sets, and classes whose rows it writes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if _name(node.value) not in {"self", "cls"}:
                yield node.attr, node
        elif isinstance(node, ast.Call):
            called = _name(node.func)
            if called in {"values", "update"}:
                keys = [
                    key for each in node.args if isinstance(each, ast.Dict) for key in each.keys
                ]
                yield from ((str(word.arg), node) for word in node.keywords if word.arg)
                yield from ((_name(key), node) for key in keys if _name(key))
            if called in {"insert", "update", "delete", "add"} and node.args:
                first = node.args[0]
                made = _name(first.func if isinstance(first, ast.Call) else first)
                if made[:1].isupper():
                    yield made, node


def _name(node: ast.AST | None) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _code(node: ast.AST) -> str:
    return " ".join(ast.unparse(node).split())[:80]
