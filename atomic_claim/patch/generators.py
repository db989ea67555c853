"""A legacy function's own commits and yields, read from its source."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from .holders import plain

LOOPS = (ast.While, ast.For, ast.AsyncFor)
DEPTH = 3
"""How many calls of helpers are followed, from one to the next."""


@dataclass(frozen=True)
class Habit:
    """When a function commits.

    Attributes:
        commits: whether it does when it has found something.
        when_empty: whether it does, too, when it has found nothing.
    """

    commits: bool
    when_empty: bool


def commit_habit(function: Callable[..., Any], sessions: Iterable[str] = ()) -> Habit | None:
    """When a function commits, by itself or by a helper.

    A helper is a method of its own object, or a function of its own package that is given one of
    these names, which are those that sessions have.

    Returns:
        The habit; where its source cannot be had, by the names that its code uses, and None where
        it has no code either.
    """
    tree = source_of(function)
    if tree is None:
        code = getattr(function, "__code__", None)
        return None if code is None else Habit("commit" in code.co_names, when_empty=False)
    helpers = _Helpers(function, frozenset(sessions), DEPTH)
    found = [_Commit(line, above) for line, above in _commits(tree, (), helpers)]
    leaves = min(
        (node.lineno for node in ast.walk(tree) if isinstance(node, ast.Return | ast.Raise)),
        default=0,
    )
    return Habit(bool(found), any(commit.when_empty(leaves) for commit in found))


@dataclass(frozen=True)
class Yields:
    """How a generator yields.

    Attributes:
        repeats: whether it does in a loop that finds again and again.
        in_loop: whether it does in any loop.
        commits_between: whether it commits in the loop that yields them one by one.
        never_ends: whether nothing in that loop leaves it.
        marks_after: the line after the first yield in which something is marked; 0 if none is.
    """

    repeats: bool = False
    in_loop: bool = False
    commits_between: bool = False
    never_ends: bool = False
    marks_after: int = 0


def yields_of(function: Callable[..., Any]) -> Yields:
    """How a generator yields, as far as its source can be had."""
    tree = source_of(function)
    if tree is None:
        return Yields()
    yields = [node for node in ast.walk(tree) if isinstance(node, ast.Yield | ast.YieldFrom)]
    # `yield None` is what a context manager does that found nothing.
    jobs = [node for node in yields if not isinstance(node.value, ast.Constant | None)]
    first = min((node.end_lineno or node.lineno for node in jobs), default=sys.maxsize)
    loops = [node for node in ast.walk(tree) if isinstance(node, LOOPS) and _has(node, jobs)]
    whiles = [node for node in loops if isinstance(node, ast.While)]
    helpers = _Helpers(function, frozenset(), 0)
    marks = [line for node in ast.walk(tree) if (line := _marked_in(node)) > first]
    return Yields(
        repeats=bool(whiles),
        in_loop=bool(loops),
        commits_between=any(
            next(_commits(node, (), helpers), None)
            for node in loops
            if _is_innermost(node, [each for each in jobs if isinstance(each, ast.Yield)])
        ),
        never_ends=any(_never_ends(node) for node in whiles),
        marks_after=min(marks, default=0),
    )


def source_of(function: Callable[..., Any]) -> ast.Module | None:
    """Return the parsed source of a function, or None if it is unavailable."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None


def _has(above: ast.AST, wanted: list[Any]) -> bool:
    return any(node in wanted for node in ast.walk(above))


def _is_innermost(loop: ast.AST, yields: list[Any]) -> bool:
    """Check whether a loop has a yield that no loop inside it has."""
    inner = [n for n in ast.walk(loop) if isinstance(n, LOOPS) and n is not loop]
    return any(_has(loop, [node]) and not any(_has(n, [node]) for n in inner) for node in yields)


def _never_ends(loop: ast.While) -> bool:
    leaves = (ast.Return, ast.Break, ast.Raise)
    is_endless = isinstance(loop.test, ast.Constant) and bool(loop.test.value)
    return is_endless and not any(isinstance(node, leaves) for node in ast.walk(loop))


def _marked_in(node: ast.AST) -> int:
    """Return the line that sets a job's attribute or executes a statement here, or 0."""
    if isinstance(node, ast.Attribute):
        is_own = isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"}
        return node.lineno if isinstance(node.ctx, ast.Store) and not is_own else 0
    if isinstance(node, ast.Call) and _name(node.func) in {"execute", "delete"}:
        return node.lineno
    return 0


@dataclass(frozen=True)
class _Helpers:
    """The functions of its own package that a function calls."""

    function: Callable[..., Any]
    sessions: frozenset[str]
    depth: int

    def commit(self, call: ast.Call) -> bool:
        """Check whether a call is to a helper that commits."""
        helper = self._called(call) if self.depth else None
        if not isinstance(helper, FunctionType):
            return False
        package = helper.__module__.partition(".")[0]
        if package != self.function.__module__.partition(".")[0]:
            return False
        tree = source_of(helper)
        further = _Helpers(helper, self.sessions, self.depth - 1)
        return tree is not None and next(_commits(tree, (), further), None) is not None

    def _called(self, call: ast.Call) -> Any:
        found = None
        if isinstance(call.func, ast.Name):
            given = [*call.args, *(keyword.value for keyword in call.keywords)]
            if any(_name(each) in self.sessions for each in given):
                found = getattr(self.function, "__globals__", {}).get(call.func.id)
        elif isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name):
            parameters = getattr(self.function, "__code__", None)
            own = parameters.co_varnames[:1] if parameters is not None else ()
            if call.func.value.id in own and (owner := _owner(self.function)) is not None:
                found = inspect.getattr_static(owner, call.func.attr, None)
        return inspect.unwrap(found) if callable(found := plain(found)) else None


def _owner(function: Callable[..., Any]) -> type[Any] | None:
    """Return the class that defines a method, or None."""
    found: Any = sys.modules.get(function.__module__)
    for part in function.__qualname__.split(".")[:-1]:
        found = getattr(found, part, None)
    return found if isinstance(found, type) else None


@dataclass(frozen=True)
class _Commit:
    """A commit, and the statements that it stands in, each with the branch of it."""

    line: int
    above: tuple[tuple[ast.AST, str], ...]

    def when_empty(self, leaves: int) -> bool:
        """Check whether it runs without a job; ``leaves`` is the line of the first return."""
        branches = [(node, branch) for node, branch in self.above]
        if any(branch in {"finalbody", "with"} for _, branch in branches):
            return True
        tests = [(node.test, b) for node, b in branches if isinstance(node, ast.If)]
        if any(branch == "body" and _says_nothing(test) for test, branch in tests):
            return True
        if tests or any(_may_not_run(node) for node, _ in branches):
            return False
        return not 0 < leaves < self.line


def _commits(
    node: ast.AST, above: tuple[tuple[ast.AST, str], ...], helpers: _Helpers
) -> Iterator[tuple[int, tuple[tuple[ast.AST, str], ...]]]:
    """Yield the commits below a node, each with its enclosing nodes."""
    if isinstance(node, ast.Call) and ("commit" in _name(node.func) or helpers.commit(node)):
        yield node.lineno, above
    if isinstance(node, ast.With | ast.AsyncWith):
        for item in node.items:
            call = item.context_expr
            if isinstance(call, ast.Call) and (_name(call.func) == "begin" or helpers.commit(call)):
                yield node.lineno, (*above, (node, "with"))
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _commits(child, (*above, (node, field)), helpers)


def _name(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr.lower()
    return node.id.lower() if isinstance(node, ast.Name) else ""


def _may_not_run(node: ast.AST) -> bool:
    """Check whether the node is a loop whose body is skipped if nothing is found."""
    if isinstance(node, ast.While):
        return not isinstance(node.test, ast.Constant)
    return isinstance(node, ast.For | ast.AsyncFor)


def _says_nothing(test: ast.expr) -> bool:
    """Check whether a condition tests that nothing was found: ``not job``, ``job is None``."""
    if isinstance(test, ast.UnaryOp):
        return isinstance(test.op, ast.Not)
    return isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.Is)
