"""Read a program's source for messages; no behaviour depends on it."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any


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
