"""The target of a patch: found, validated and named before anything is replaced."""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial, reduce
from itertools import pairwise
from types import FunctionType, MethodType, ModuleType
from typing import Any

from wrapt import BaseObjectProxy, BoundFunctionWrapper, FunctionWrapper

from atomic_claim.errors import PatchError

from .holders import Attribute, Getter, Place, inner_of, places_in, plain

# What these decorators return is always of the same code.
_DECORATORS: tuple[Any, ...] = (contextmanager, asynccontextmanager)
CONTEXTS = {decorator(iter).__code__ for decorator in _DECORATORS}


class PatchWrapper(FunctionWrapper[..., Any]):
    """A wrapper that stands in place of a patched function."""

    def __init__(self, wrapped: Any, wrapper: Any, patch: Any) -> None:
        super().__init__(wrapped, wrapper)
        self._self_patch = patch

    @property
    def patch(self) -> Any:
        """The patch that put it there."""
        return self._self_patch


@dataclass(eq=False)
class Target:
    """A function to be patched, and where it is held.

    Attributes:
        name: as a user writes it, ``"module:Class.method"``.
        wrapped: what is wrapped: the function inside all decorators, or its static or class method.
        places: where it is held.
        signature: the function's own signature, with ``self``.
        overrides: the subclasses' methods that stand in its place, which are not patched.
        unpatched: other names of it that are not patched.
        is_context: whether a decorator makes a context manager of it.
        is_over: whether its module has run to its end, though its import goes on.
    """

    name: str
    wrapped: Any
    places: list[Place]
    signature: inspect.Signature
    overrides: list[str] = field(default_factory=list)
    unpatched: list[str] = field(default_factory=list)
    is_context: bool = False
    is_over: bool = False

    @property
    def function(self) -> Callable[..., Any]:
        """The function itself, in a partial one or behind an object that is called."""
        found = plain(self.wrapped)
        while isinstance(found, partial):
            found = plain(found.func)
        if not inspect.isroutine(found):
            called = inspect.getattr_static(type(found), "__call__", None)
            found = called if isinstance(called, FunctionType) else found
        return found  # type: ignore[no-any-return]


def parts_of(given: str) -> tuple[str, str]:
    """Split ``"module:Class.method"`` into the module and the path."""
    module, colon, path = given.partition(":")
    names = [*module.split("."), *path.split(".")]
    if not colon or not all(name.isidentifier() for name in names):
        raise PatchError(
            f"{given!r} is not a target: write 'package.module:function' or "
            "'package.module:Class.method', or pass the function itself"
        )
    return module, path


def named_target(module: ModuleType, path: str) -> Target:
    """Return the target at a path in a loaded module.

    Raises:
        PatchError: it is not there, is patched already, or cannot be patched.
    """
    name = f"{module.__name__}:{path}"
    *above, last = path.split(".")
    owner: Any = module
    for part in above:
        owner = _member(owner, part, name)
    return _target(name, owner, last)


def object_target(given: Any) -> Target:
    """Return the target for a function or method.

    Raises:
        PatchError: nothing is known that holds it, or as for :func:`named_target`.
    """
    _refuse_patched(given, _title(given))
    if isinstance(given, MethodType):
        owner, name = given.__self__, given.__func__.__name__
        if not isinstance(owner, type):
            return _target(f"{_title(type(owner))}.{name} of one object", owner, name)
        return _target(f"{_title(owner)}.{name}", owner, name)
    if not callable(given) or isinstance(given, type):
        raise PatchError(
            f"{given!r} is not a function or a method: pass one, or its name as "
            "'package.module:Class.method'"
        )
    for place in _holders(given):
        dot = ":" if isinstance(place.owner, ModuleType) else "."
        return _target(f"{_title(place.owner)}{dot}{place.name}", place.owner, place.name)
    raise PatchError(
        f"{given!r} is held by no module and no class that is loaded, so nothing can be put in its "
        "place: decorate it with claims(...)"
    )


def _holders(given: Any) -> Iterator[Attribute]:
    """Return the place where a function was defined, or else one that holds it by another name."""
    own = sys.modules.get(getattr(given, "__module__", None) or "")
    *above, last = getattr(given, "__qualname__", "").split(".")
    with suppress(AttributeError, TypeError):
        owner = reduce(getattr, above, own)
        if plain(_lookup(owner, last)) is given:
            yield Attribute(owner, last)
    for module in _modules():
        for value in list(vars(module).values()):
            if isinstance(value, type) and value.__module__ == module.__name__:
                for name, held in list(vars(value).items()):
                    if plain(held) is given:
                        yield Attribute(value, name)
    yield from _bindings(given)


def _modules() -> list[ModuleType]:
    return [module for module in list(sys.modules.values()) if isinstance(module, ModuleType)]


def _title(given: Any) -> str:
    if isinstance(given, ModuleType):
        return given.__name__
    module = getattr(given, "__module__", None)
    name = getattr(given, "__qualname__", None) or repr(given)
    return f"{module}:{name}" if module else name


def _lookup(owner: Any, name: str) -> Any:
    """Return the attribute stored under a name without binding it."""
    if isinstance(owner, type):
        return inspect.getattr_static(owner, name)
    return getattr(owner, name)


def _member(owner: Any, name: str, target: str) -> Any:
    try:
        return _lookup(owner, name)
    except AttributeError:
        similar = difflib.get_close_matches(name, dir(owner), n=3)
        hint = f"; did you mean {' or '.join(map(repr, similar))}?" if similar else ""
        where = getattr(owner, "__qualname__", None) or getattr(owner, "__name__", repr(owner))
        raise PatchError(f"{target} does not exist: {where} has no {name!r}{hint}") from None


def _target(name: str, owner: Any, last: str) -> Target:
    stored = _member(owner, last, name)
    if isinstance(stored, type) or not callable(plain(stored)):
        raise PatchError(f"{name} is {stored!r}; expected a function or a method")
    root = Attribute(owner, last)
    wrapped, places, is_context = _innermost(name, stored, root, last)
    if places != [root] and root.get() is not stored:
        raise PatchError(
            f"{name} is inherited and decorated, and its decorators are shared with the class that "
            "defines it: patch it there"
        )
    found = Target(name, wrapped, places, _signature(name, wrapped), is_context=is_context)
    if isinstance(owner, type):
        found.overrides = [f"{_title(each)}.{last}" for each in _overriding(owner, last)]
    if places == [root]:
        others = [place for place in _bindings(plain(stored)) if place.owner is not owner]
        if isinstance(owner, ModuleType):
            places += others
            places += [p for p in _bindings(stored) if p.owner is owner and p.name != last]
        else:
            found.unpatched = [str(place) for place in others]
    return found


def _innermost(name: str, stored: Any, root: Attribute, last: str) -> tuple[Any, list[Place], bool]:
    """Return the function inside all decorators, which then keep working around the claim.

    With it, where it is held, and whether a decorator makes a context manager of it.
    """
    places: list[Place] = [root]
    is_context = False
    if type(stored) is property:
        stored, places = stored.fget, [Getter(root.owner, last, stored)]
    layers = list(_layers(stored, name, last))
    for outer, inner in pairwise(layers):
        is_context = is_context or getattr(plain(outer), "__code__", None) in CONTEXTS
        places = places_in(outer, inner)
        if not any(_is_effective(place) for place in places):
            raise PatchError(
                f"{name} is decorated by {plain(outer)!r}, which keeps {inner!r} where it cannot "
                "be replaced: put claims(...) below that decorator, or patch what it calls"
            )
    return layers[-1], places, is_context


def _layers(wrapped: Any, name: str, last: str) -> Iterator[Any]:
    """Yield a decorated function from outside in, and refuse one that is patched already."""
    while wrapped is not None:
        _refuse_patched(wrapped, name)
        yield wrapped
        wrapped = inner_of(wrapped, last)


def _is_effective(place: Place) -> bool:
    """Check whether a function stored at this place is the one that is called."""
    if not isinstance(place, Attribute) or place.name != "__wrapped__":
        return True
    owner = place.owner
    if issubclass(type(owner), BaseObjectProxy):
        return True
    # functools.wraps() leaves a mere note, and what is written in C keeps its own reference.
    caller = inspect.getattr_static(type(owner), "__call__", None)
    return type(owner) is not FunctionType and isinstance(caller, FunctionType)


def _refuse_patched(value: Any, name: str) -> None:
    if issubclass(type(value), BoundFunctionWrapper):
        value = value._self_parent  # noqa: SLF001 - wrapt's name for what an attribute is bound of
    if issubclass(type(value), PatchWrapper):
        raise PatchError(
            f"{name} is patched already ({value.patch!r}): undo() that one first, or leave one of "
            "the two out"
        )


def _signature(name: str, wrapped: Any) -> inspect.Signature:
    try:
        return inspect.signature(plain(wrapped), follow_wrapped=False)
    except (TypeError, ValueError) as error:
        raise PatchError(f"the parameters of {name} cannot be read: {error}") from error


def _overriding(owner: type[Any], name: str) -> Iterator[type[Any]]:
    for each in type.__subclasses__(owner):
        if name in vars(each):
            yield each
        yield from _overriding(each, name)


def _bindings(function: Any) -> list[Attribute]:
    """Return the module attributes that ``from module import function`` bound to a function."""
    return [
        Attribute(module, name)
        for module in _modules()
        for name, value in list(vars(module).items())
        if value is function
    ]


def loaded(function: Any) -> Target:
    """Return the target for a function that is being decorated and is not stored anywhere yet."""
    name = _title(plain(function))
    if isinstance(function, type) or not callable(plain(function)):
        raise PatchError(f"{name} is {function!r}; expected a function or a method")
    *_, wrapped = _layers(function, name, getattr(plain(function), "__name__", ""))
    return Target(name, function, [], _signature(name, wrapped))
