"""The arguments of a patched call, and how a patch's options are read from it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from atomic_claim.errors import PatchError

Reader = Callable[["Call"], Any]
VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


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


@dataclass(frozen=True, eq=False)
class Reading:
    """How one option of a patch is read from a call.

    Attributes:
        role: the option's name.
        given: what the user wrote.
        read: reads it from a call.
        constant: whether it is the same for every call.
    """

    role: str
    given: Any
    read: Reader
    constant: bool = False


def reading(
    role: str,
    given: Any,
    signature: inspect.Signature,
    target: str,
    *,
    is_constant: Callable[[Any], bool] = lambda _: False,
) -> Reading:
    """How an option is read: a constant, a parameter, a path from one, or a callable.

    A string that is a parameter's name, or a dotted path that begins with one, is read from the
    call. Any other string is a constant if the option can be a string, and refused if not.

    Args:
        role: the option's name.
        given: what the user wrote.
        signature: the signature of the function that is patched.
        target: the name of that function.
        is_constant: whether a string that is no parameter, or a callable, is meant as it is.

    Raises:
        PatchError: a string names no parameter, and cannot be meant as it is.
    """
    if isinstance(given, str):
        first, *rest = given.split(".")
        if first in signature.parameters and (rest or _is_plain(signature.parameters[first])):
            return Reading(role, given, _path_reader(role, first, rest, target))
        if not is_constant(given):
            raise PatchError(
                f"{role}={given!r} is not a parameter of {target}, nor a path from one; it has "
                f"{_named(signature)}"
            )
    elif callable(given) and not is_constant(given):
        return Reading(role, given, _callable_reader(given))
    return Reading(role, given, lambda _: given, constant=True)


def _is_plain(parameter: inspect.Parameter) -> bool:
    return parameter.kind not in VARIABLE


def _named(signature: inspect.Signature) -> str:
    return ", ".join(signature.parameters) or "no parameters"


def _path_reader(role: str, first: str, rest: list[str], target: str) -> Reader:
    def read(call: Call) -> Any:
        found = call.arguments[first]
        for part in rest:
            if isinstance(found, Mapping):
                found = found.get(part)
                continue
            try:
                found = getattr(found, part)
            except AttributeError as error:
                path = ".".join([first, *rest])
                raise PatchError(f"{role}={path!r} of {target} leads nowhere: {error}") from error
        return found

    return read


def _callable_reader(given: Callable[..., Any]) -> Reader:
    """Call it with the call, or with nothing if that is all that it takes."""
    if positional(given) == 0:
        return lambda _: given()
    return given


def positional(given: Callable[..., Any]) -> int:
    """How many arguments a callable can be given by position, 2 at most."""
    try:
        parameters = inspect.signature(given).parameters.values()
    except (TypeError, ValueError):
        return 1
    places = 0
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            return 2
        places += parameter.kind in {
            inspect.Parameter.POSITIONAL_ONLY,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
        }
    return min(places, 2)
