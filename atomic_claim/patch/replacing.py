"""Shared by patches that replace a function: read the call, and convert the claimed jobs."""

from __future__ import annotations

import copy
import inspect
import logging
import operator
import warnings
from abc import ABC, abstractmethod
from collections.abc import (
    AsyncIterator,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Sequence,
)
from contextlib import AbstractAsyncContextManager, contextmanager
from functools import partial
from typing import Any, TypeVar

from atomic_claim.errors import PatchError

from .calls import VARIABLE, Call, Options, Reading, Reference, fitted
from .options import ClaimOptions
from .patches import Patch
from .sources import yield_notes
from .targets import Target

T = TypeVar("T")

ALL = 2**31 - 1
logger = logging.getLogger("atomic_claim")


Answer = tuple[bool, Callable[[], Any]]
"""The outcome of one claim: whether it found a job, and what returns or raises the result."""


class Replacing(ABC):
    """The base of the replacements of one function.

    Args:
        patch: what counts.
        target: the function.
        options: the options of the patch.
    """

    def __init__(self, patch: Patch, target: Target, options: ClaimOptions) -> None:
        self.patch = patch
        self.target = target
        self.options = Options(target)
        function = target.function
        is_async = inspect.isasyncgenfunction(function)
        self._yields = is_async or inspect.isgeneratorfunction(function)
        self.is_generator = self._yields and not target.is_context
        self.is_coroutine = is_async or inspect.iscoroutinefunction(function)
        limit = options.get("limit", None if self.is_generator else 1)
        self.single = self.is_generator or (limit == 1 and limit is not True)
        self.limit = self.options.reading("limit", limit)
        self.worker = self.options.reading(
            "worker", options.get("worker"), lambda given: isinstance(given, str)
        )
        self.empty = self.options.reading("empty", options.get("empty"), _is_answer)
        self.when = self._when(options.get("when"))
        self.returns, takes = self._adapter(options.get("returns"))
        self.returns_bind = takes is None or "bind" in takes
        self._adapts_call = takes is None or "call" in takes
        most = self.limit.given
        if self.limit.constant and not (most is None or (type(most) is int and most >= 1)):
            raise PatchError(
                f"limit={self.limit.given!r} of {target.name}: expected an int of at least 1, "
                "None for all, or the name of a parameter"
            )
        for note in yield_notes(function) if self._yields else ():
            warnings.warn(f"{target.name} {note}", stacklevel=8)

    def _when(self, given: Any) -> Reading:
        if isinstance(given, str) and given.startswith("not "):
            plain = self.options.reading("when", given.removeprefix("not ").strip())
            return Reading(given, lambda call: not plain.read(call), names=plain.names)
        return self.options.reading("when", True if given is None else given)

    def check_dropped(self, ignore: Iterable[str]) -> None:
        """Refuse a parameter that no option reads: what it asks for would be left out.

        Raises:
            PatchError: there is one, or a name to ignore is no parameter.
        """
        parameters = self.target.signature.parameters
        ignored = {ignore} if isinstance(ignore, str) else set(ignore)
        if unknown := ignored.difference(parameters):
            raise PatchError(
                f"ignore={sorted(unknown)!r} of {self.target.name}: it has "
                f"{', '.join(parameters) or 'no parameters'}"
            )
        readings = [each for each in vars(self).values() if isinstance(each, Reading)]
        read: set[str] = set(parameters) if self._adapts_call else set()
        for each in readings:
            read.update(parameters if each.names is None else each.names)
        own = {name for name in list(parameters)[:1] if name in {"self", "cls"}}
        unread = [name for name in parameters if name not in read | ignored | own]
        self._unread = [name for name in unread if parameters[name].kind in VARIABLE]
        if plain := [name for name in unread if name not in self._unread]:
            raise PatchError(
                f"{self.target.name} has {', '.join(map(repr, plain))}, which no option reads, so "
                "what a call gives would be dropped: name it in the option that needs it, as "
                f"where={{'column': {plain[0]!r}}}, or agree with ignore={plain!r}"
            )

    @abstractmethod
    def claimed(
        self, call: Call, limit: int
    ) -> AbstractAsyncContextManager[tuple[Sequence[Any], Any]]:
        """Claim; yield the jobs and the bind while they can be read.

        Where the function is no coroutine, nothing in it waits.
        """

    def run(self, call: Call, original: Callable[[], Any]) -> Any:
        """Run in place of the function, and return what a function of its kind returns."""
        if (limit := self._limit_of(call)) is None:
            return original()
        if self._yields:
            made = self._generate_async if self.is_coroutine else self._generate
            return made(call, limit)
        result = self._result(call, limit)
        return result if self.is_coroutine else finished(result)

    async def _result(self, call: Call, limit: int) -> Any:
        _, get = await self._once(call, limit)
        return get()

    def _generate(self, call: Call, limit: int) -> Generator[Any, Any, Any]:
        for each in self._rounds(limit):
            found, get = finished(self._once(call, each))
            if self.is_generator and not found:
                break
            yield get()

    async def _generate_async(self, call: Call, limit: int) -> AsyncIterator[Any]:
        for each in self._rounds(limit):
            found, get = await self._once(call, each)
            if self.is_generator and not found:
                break
            yield get()

    @contextmanager
    def _logged(self) -> Iterator[None]:
        """Log what is refused, since callers of jobs swallow errors."""
        try:
            yield
        except PatchError as error:
            logger.error("%s: %s", self.target.name, error)
            raise

    def _limit_of(self, call: Call) -> int | None:
        """Return how many jobs a call claims at most, or None if it does not claim."""
        with self._logged():
            if not self.when.read(call):
                self.patch.count(passed_through=1)
                return None
            if dropped := [name for name in self._unread if call.arguments[name]]:
                raise PatchError(
                    f"{self.target.name} was given {call.arguments[dropped[0]]!r} for "
                    f"{dropped[0]!r}, which no option reads: name it in one, or in "
                    f"ignore={dropped!r}"
                )
            limit = self.limit.read(call)
            return ALL if limit is None else int(limit)

    def _rounds(self, limit: int) -> Iterable[int]:
        """Yield the limit of each claim: a generator's consumer may stop after any job."""
        return (1 for _ in range(limit)) if self.is_generator else [limit]

    async def _once(self, call: Call, limit: int) -> Answer:
        """Claim, and make the function's result while the session is open."""
        with self._logged():
            async with self.claimed(call, limit) as (claim, bind):
                empty = None if claim else self.empty.read(call)
                if not claim and (self.single or empty is not None):
                    return False, partial(_answered, empty)
                answer = self.returns(claim[0] if self.single else claim, call, bind)
                if self.is_coroutine and inspect.isawaitable(answer):
                    answer = await answer
                return bool(claim), lambda: answer

    def _adapter(self, given: Any) -> tuple[Callable[..., Any], frozenset[str] | None]:
        """Return what makes the result of the jobs, the call and the bind, and what it takes."""
        if given is None or isinstance(given, str):
            read: Callable[[Any], Any] = operator.attrgetter(given) if given else lambda job: job
            if self.single:
                return (lambda job, *_: read(job)), frozenset()
            return (lambda jobs, *_: [read(job) for job in jobs]), frozenset()
        if isinstance(given, Reference):
            found = self.options.found(given)
            takes = None if found is None else self._fitted(found)[1]
            return (lambda *each: self._fitted(given.resolve())[0](*each)), takes  # noqa: PLW0108
        return self._fitted(given)

    def _fitted(self, given: Any) -> tuple[Callable[..., Any], frozenset[str]]:
        what = f"returns={given!r} of {self.target.name}"
        if not callable(given):
            raise PatchError(
                f"{what}: expected a callable that gets what was claimed, or the name of an "
                "attribute of the jobs"
            )
        if inspect.iscoroutinefunction(given) and not self.is_coroutine:
            raise PatchError(
                f"{what} is a coroutine function, and the function that it is for is "
                "none: expected a plain function"
            )
        return fitted(given, ("found", "call", "bind"), what, least=1)


def finished(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    coroutine.close()
    raise AssertionError("the claim of a plain function waited for an event loop")


def _answered(empty: Any) -> Any:
    """Return or raise what stands for nothing."""
    if isinstance(empty, type) and issubclass(empty, BaseException):
        raise empty
    if isinstance(empty, BaseException):
        raise copy.copy(empty)
    return copy.copy(empty)


def _is_answer(given: Any) -> bool:
    """Check whether it is the value to return or raise rather than a function that makes it."""
    return isinstance(given, (str, BaseException)) or (
        isinstance(given, type) and issubclass(given, BaseException)
    )
