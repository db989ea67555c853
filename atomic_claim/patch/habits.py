"""Whether a legacy function commits by itself, read from its own source."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Habit:
    """When a function commits.

    Attributes:
        commits: whether it does when it has found something.
        when_empty: whether it does, too, when it has found nothing.
    """

    commits: bool
    when_empty: bool


def commit_habit(function: Callable[..., Any]) -> Habit:
    """When a function commits; where its source cannot be had, by the names that its code uses."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        names = getattr(getattr(function, "__code__", None), "co_names", ())
        return Habit("commit" in names, when_empty=False)
    found = [_Commit(line, above) for line, above in _commits(tree, ())]
    leaves = min(
        (node.lineno for node in ast.walk(tree) if isinstance(node, ast.Return | ast.Raise)),
        default=0,
    )
    return Habit(bool(found), any(commit.when_empty(leaves) for commit in found))


@dataclass(frozen=True)
class _Commit:
    """A commit, and the statements that it stands in, each with the branch of it."""

    line: int
    above: tuple[tuple[ast.AST, str], ...]

    def when_empty(self, leaves: int) -> bool:
        """Whether it is reached without a job; ``leaves`` is the line of the first return."""
        branches = [(node, branch) for node, branch in self.above]
        if any(branch in {"finalbody", "with"} for _, branch in branches):
            return True
        tests = [(node.test, b) for node, b in branches if isinstance(node, ast.If)]
        if any(branch == "body" and _says_nothing(test) for test, branch in tests):
            return True
        if tests or any(isinstance(node, ast.For | ast.AsyncFor) for node, _ in branches):
            return False
        return not 0 < leaves < self.line


def _commits(node: ast.AST, above: tuple[tuple[ast.AST, str], ...]) -> Iterator[Any]:
    """The commits below a node, with what they stand in."""
    if isinstance(node, ast.Call) and "commit" in _name(node.func):
        yield node.lineno, above
    if isinstance(node, ast.With | ast.AsyncWith):
        for item in node.items:
            call = item.context_expr
            if isinstance(call, ast.Call) and _name(call.func) == "begin":
                yield node.lineno, (*above, (node, "with"))
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _commits(child, (*above, (node, field)))


def _name(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr.lower()
    return node.id.lower() if isinstance(node, ast.Name) else ""


def _says_nothing(test: ast.expr) -> bool:
    """Whether a condition is that nothing was found: ``not job``, ``job is None``."""
    if isinstance(test, ast.UnaryOp):
        return isinstance(test.op, ast.Not)
    return isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.Is)
