"""The arguments of a patched call, and how a patch's options are read from it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func

from atomic_claim.errors import PatchError
from atomic_claim.references import resolve

from .main_module import is_importing, is_main, loaded_module
from .targets import Target

Reader = Callable[["Call"], Any]
EMPTY = inspect.Parameter.empty
VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
PLACES = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.VAR_POSITIONAL,
)


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a patched function, its arguments bound by the function's own signature.

    ``call.arguments["limit"]``, ``call["limit"]`` and ``call.limit`` are the same; defaults are
    applied, and a method's ``self`` is among them.

    Attributes:
        arguments: the arguments by the names of their parameters.
        args: the arguments that were passed by position, without ``self``.
        kwargs: those that were passed by keyword.
    """

    arguments: Mapping[str, Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.arguments[name]
        except KeyError:
            raise AttributeError(
                f"the call has no argument {name!r}; it has {', '.join(self.arguments)}"
            ) from None


def bound_call(
    signature: inspect.Signature, instance: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Call | None:
    """Bind the arguments, or return None if they do not fit the signature."""
    given = args if instance is None else (instance, *args)
    try:
        bound = signature.bind(*given, **kwargs)
    except TypeError:
        return None
    bound.apply_defaults()
    return Call(bound.arguments, args, kwargs)


@dataclass(frozen=True)
class Reference:
    """An object that is named ``"module:name"``, and found when it is needed."""

    name: str

    def __repr__(self) -> str:
        return repr(self.name)

    def resolve(self) -> Any:
        """Return the object; import its module if necessary.

        Raises:
            PatchError: there is nothing of that name.
        """
        module, _, path = self.name.partition(":")
        # A module that another thread is importing is waited for; the main module is never new.
        main = loaded_module(module)
        try:
            return resolve(f"{main.__name__ if main else module}:{path}")
        except (ImportError, AttributeError) as error:
            raise PatchError(f"{self.name!r} cannot be imported: {error}") from error


@dataclass(frozen=True, eq=False)
class Reading:
    """The way in which one option of a patch is read from a call.

    Attributes:
        given: what the user wrote.
        read: reads it from a call.
        constant: whether it is the same for every call.
        names: the parameters that it is read from; None if it is given the call, and may read all.
    """

    given: Any
    read: Reader
    constant: bool = False
    names: frozenset[str] | None = frozenset()


@dataclass(frozen=True)
class Options:
    """Reads the options of the patch of one function."""

    target: Target

    def reading(
        self, role: str, given: Any, is_constant: Callable[[Any], bool] = lambda _: False
    ) -> Reading:
        """Return the reading of an option: a constant, a parameter, a path from one, or a callable.

        A string that is a parameter's name, or a dotted path that begins with one, is read from
        the call, within dictionaries and lists too; ``"now()"`` is there the database's clock.
        Any other string is a constant within those, or if the option can be a string.

        Args:
            role: the option's name.
            given: what the user wrote.
            is_constant: whether a string that is no parameter, or a callable, is meant as it is.

        Raises:
            PatchError: a string names no parameter, and cannot be meant as it is; or a callable
                takes more than the call.
        """
        if isinstance(given, str) and self.parts(given) is None and not is_constant(given):
            raise PatchError(
                f"{role}={given!r} is not a parameter of {self.target.name}, nor a path from one; "
                f"it has {', '.join(self.target.signature.parameters) or 'no parameters'}"
            )
        if isinstance(given, Reference):
            found = self.found(given)
            names = None if found is None else frozenset[str]()
            if callable(found):
                names = self.reading(role, found, is_constant).names
            return Reading(given, self._named(role, given, is_constant), names=names)
        if callable(given) and not is_constant(given):
            run, takes = fitted(given, ("call",), f"{role}={given!r} of {self.target.name}")
            return Reading(given, run, names=None if takes else frozenset())
        used: set[str] = set()
        read = self._compiled(role, given, used)
        if used:
            return Reading(given, read, names=frozenset(used))
        value = read(Call({}, (), {}))
        return Reading(value, lambda _: value, constant=True)

    def parts(self, given: str) -> list[str] | None:
        """Split a parameter's name or a path from one; None if it is neither."""
        first, *rest = given.split(".")
        parameter = self.target.signature.parameters.get(first)
        if parameter is None or (not rest and parameter.kind in VARIABLE):
            return None
        return [first, *rest]

    def found(self, given: Reference) -> Any:
        """Return a named object if it can be had when patching, else None.

        Raises:
            PatchError: there is nothing of that name, and no import goes on that could define it.
        """
        module = given.name.partition(":")[0]
        complete = self.target.name.partition(":")[0] if self.target.is_over else ""
        if loaded_module(module) is None and is_importing(complete):
            return None
        try:
            return given.resolve()
        except PatchError:
            if is_main(module) or is_importing(complete, module):
                return None
            raise

    def _named(self, role: str, given: Reference, is_constant: Callable[[Any], bool]) -> Reader:
        def read(call: Call) -> Any:
            found = given.resolve()
            if not callable(found):
                return found
            return self.reading(role, found, is_constant).read(call)

        return read

    def _compiled(self, role: str, given: Any, names: set[str]) -> Reader:
        """Return what reads a value with all that is nested in it; note the parameters."""
        if isinstance(given, str):
            if (parts := self.parts(given)) is not None:
                names.add(parts[0])
                return self._path_reader(role, given, parts)
            return lambda _: func.now() if given == "now()" else given
        if isinstance(given, Mapping):
            nested = {name: self._compiled(role, each, names) for name, each in given.items()}
            return lambda call: {name: read(call) for name, read in nested.items()}
        if type(given) in {list, tuple}:
            reads = [self._compiled(role, each, names) for each in given]
            return lambda call: [read(call) for read in reads]
        return lambda _: given

    def _path_reader(self, role: str, path: str, parts: list[str]) -> Reader:
        def read(call: Call) -> Any:
            found = call.arguments[parts[0]]
            for part in parts[1:]:
                if isinstance(found, Mapping):
                    found = found.get(part)
                    continue
                try:
                    found = getattr(found, part)
                except AttributeError as error:
                    raise PatchError(
                        f"{role}={path!r} of {self.target.name} leads nowhere: {error}"
                    ) from error
            return found

        return read


def fitted(
    given: Callable[..., Any], offered: tuple[str, ...], what: str, *, least: int = 0
) -> tuple[Callable[..., Any], frozenset[str]]:
    """Return a function of all that is offered, and what of it the callable is given.

    A parameter with the name of something offered is given that; any other required one is given
    the first thing that no parameter is named after; an optional one is left alone.

    Args:
        given: the callable.
        offered: the names of what is offered.
        what: the option, for messages.
        least: how many are given by position even to optional parameters.

    Raises:
        PatchError: it needs more than is offered.
    """
    try:
        parameters = list(inspect.signature(given).parameters.values())
    except (TypeError, ValueError):
        # Some callables that are written in C have no signature; they take one argument.
        return (lambda *values: given(values[0])), frozenset(offered[:1])
    rest = [name for name in offered if name not in {each.name for each in parameters}]
    by_place: list[str] = []
    by_name: list[str] = []
    for each in parameters:
        wanted = each.name if each.name in offered else None
        is_needed = each.default is EMPTY and each.kind not in VARIABLE
        if each.kind in PLACES and (is_needed or len(by_place) < least):
            by_place.append(wanted or (rest.pop(0) if rest else each.name))
        elif is_needed or wanted:
            by_name.append(each.name)
    if unknown := set(by_place + by_name).difference(offered):
        raise PatchError(
            f"{what} takes {', '.join(sorted(unknown))}, and is given {', '.join(offered)} at "
            "most; give what is missing a default"
        )

    def run(*values: Any) -> Any:
        known = dict(zip(offered, values, strict=True))
        return given(*(known[name] for name in by_place), **{n: known[n] for n in by_name})

    return run, frozenset(by_place + by_name)
