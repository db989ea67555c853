"""Shared by patches that replace a function: read the call, and convert the claimed jobs."""

from __future__ import annotations

import copy
import inspect
import operator
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Any

from atomic_claim.errors import PatchError

from .calls import Call, Reading, bound_call, positional, reading
from .generators import Yields, yields_of
from .patches import Patch
from .targets import Target

ONE: Any = object()
"""The limit of a function that claims one job and returns it, not a list."""
ALL = 2**31 - 1


class Replacing(ABC):
    """The base of the replacements of one function.

    Args:
        patch: what counts.
        target: the function.
        limit: how many jobs at most.
        worker: the claiming worker's name.
        returns: makes what the function returns.
        empty: what it returns if nothing was claimed.
        when: which calls claim.
    """

    def __init__(
        self,
        patch: Patch,
        target: Target,
        *,
        limit: Any,
        worker: Any,
        returns: Any,
        empty: Any,
        when: Any,
    ) -> None:
        self.patch = patch
        self.target = target
        self.single = limit is ONE or (isinstance(limit, int) and limit == 1 and limit is not True)
        self.limit = self._reading("limit", 1 if self.single else limit)
        self.worker = self._reading("worker", worker, is_text)
        self.empty = self._reading("empty", empty, _is_answer)
        self.when = self._when(when)
        self.returns = _adapter(returns, single=self.single)
        self.yields = self._yields()
        self._check_constants()
        self.in_all = self.limit
        if self.yields.commits_between:
            # Whoever consumes it may stop, and what it has not yet yielded is then free.
            self.limit = self._reading("limit", 1)

    def _reading(
        self, role: str, given: Any, is_constant: Callable[[Any], bool] = lambda _: False
    ) -> Reading:
        signature, name = self.target.signature, self.target.name
        return reading(role, given, signature, name, is_constant=is_constant)

    def _when(self, given: Any) -> Reading:
        if isinstance(given, str) and given.startswith("not "):
            plain = self._reading("when", given.removeprefix("not ").strip())
            return Reading("when", given, lambda call: not plain.read(call))
        return self._reading("when", True if given is None else given)

    def _yields(self) -> Yields:
        """How the function yields, if it is a generator.

        Raises:
            PatchError: what it does between two yields cannot be left out.
        """
        function, name = self.target.function, self.target.name
        if not (inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)):
            return Yields()
        found = yields_of(function)
        if found.marks_after:
            raise PatchError(
                f"{name} goes on after its yield, and marks something there (line "
                f"{found.marks_after} of it), which a claim in its place would leave out: have it "
                "run as it is, over claimed rows, by claim_reads()"
            )
        if found.never_ends:
            raise PatchError(
                f"{name} never ends, it waits for more: patch the function that it finds one job "
                "by, or have it run as it is, over claimed rows, by claim_reads()"
            )
        return found

    def _check_constants(self) -> None:
        """Find out now what would else be found out by the first call."""
        if self.limit.constant and not (self.limit.given is None or _is_count(self.limit.given)):
            raise PatchError(
                f"limit={self.limit.given!r} of {self.target.name}: expected an int of at least 1, "
                "None for all, or the name of a parameter"
            )

    @abstractmethod
    def claimed(self, call: Call) -> AbstractContextManager[Sequence[Any]]:
        """Claim for a call of a function; yield the jobs while they can be read."""

    @abstractmethod
    def claimed_async(self, call: Call) -> AbstractAsyncContextManager[Sequence[Any]]:
        """Claim for a call of a coroutine; yield the jobs while they can be read."""

    def run(
        self, wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """In place of a function."""
        call = self._call(instance, args, kwargs)
        if call is None:
            return wrapped(*args, **kwargs)
        with self.claimed(call) as claim:
            return self._answer(call, claim)

    def generate(
        self, wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Generator[Any, Any, Any]:
        """In place of a generator."""
        call = self._call(instance, args, kwargs)
        if call is None:
            return (yield from wrapped(*args, **kwargs))
        for _ in range(self._rounds(call)):
            with self.claimed(call) as claim:
                answer = self._part(call, claim)
            yield from answer
            if not claim:
                break
        return None

    async def run_async(
        self, wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """In place of a coroutine."""
        call = self._call(instance, args, kwargs)
        if call is None:
            return await wrapped(*args, **kwargs)
        async with self.claimed_async(call) as claim:
            return self._answer(call, claim)

    async def generate_async(
        self, wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> AsyncIterator[Any]:
        """In place of an asynchronous generator."""
        call = self._call(instance, args, kwargs)
        if call is None:
            async for each in wrapped(*args, **kwargs):
                yield each
            return
        for _ in range(self._rounds(call)):
            async with self.claimed_async(call) as claim:
                answer = self._part(call, claim)
            for each in answer:
                yield each
            if not claim:
                break

    def _call(self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """Bind the call, or return None if it does not claim or the signature does not fit."""
        call = bound_call(self.target.signature, instance, args, kwargs)
        if call is None or not self.when.read(call):
            self.patch.count(passed_through=1)
            return None
        return call

    def _rounds(self, call: Call) -> int:
        """How often a generator claims at most, if it goes on finding jobs."""
        if self.target.is_context:
            return 1
        if self.yields.repeats or (self.single and self.yields.in_loop):
            return ALL
        limit = self.in_all.read(call) if self.yields.commits_between else 1
        return ALL if limit is None else limit

    def _part(self, call: Call, claim: Sequence[Any]) -> Iterable[Any]:
        """Return what a generator yields for one claim; a context manager always yields once."""
        answer = self._answer(call, claim)
        if self.target.is_context:
            return [answer]
        if self.single:
            return [answer] if claim else []
        return answer  # type: ignore[no-any-return]

    def _answer(self, call: Call, claim: Sequence[Any]) -> Any:
        """Return the function's result, or raise its exception."""
        if claim:
            return self.returns(claim[0] if self.single else claim, call)
        empty = self.empty.read(call)
        if isinstance(empty, BaseException):
            raise copy.copy(empty)
        if isinstance(empty, type) and issubclass(empty, BaseException):
            raise empty
        if empty is not None:
            return copy.copy(empty)
        return None if self.single else self.returns(claim, call)


def is_text(given: Any) -> bool:
    """Check whether the option is a literal string."""
    return isinstance(given, str)


def _is_count(given: Any) -> bool:
    return isinstance(given, int) and not isinstance(given, bool) and given >= 1


def _is_answer(given: Any) -> bool:
    """Check whether it is the value to return or raise rather than a function that makes it."""
    return isinstance(given, (str, BaseException)) or (
        isinstance(given, type) and issubclass(given, BaseException)
    )


def _adapter(given: Any, *, single: bool) -> Callable[[Any, Call], Any]:
    if given is None:
        return lambda found, _: found if single else list(found)
    if isinstance(given, str):
        try:
            read = operator.attrgetter(given)
        except TypeError as error:
            raise PatchError(f"returns={given!r} is no attribute's name: {error}") from error
        if single:
            return lambda job, _: read(job)
        return lambda jobs, _: [read(job) for job in jobs]
    if not callable(given):
        raise PatchError(
            f"returns={given!r}; expected a callable that gets what was claimed, or the name of an "
            "attribute of the jobs"
        )
    if inspect.iscoroutinefunction(given):
        raise PatchError(f"returns={given!r} is a coroutine; expected a plain function")
    # A class such as `dict` or `list` takes what it is given, and has no use for the call.
    if positional(given) == 2 and inspect.isfunction(given):  # noqa: PLR2004 - found, call
        return given
    return lambda found, _: given(found)
