"""Where a callable is held: in an attribute, in a decorator's closure, in another wrapper."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CellType, FunctionType, MethodType
from typing import Any

from wrapt import BaseObjectProxy

MISSING: Any = object()


@dataclass(frozen=True, eq=False)
class Attribute:
    """An attribute of a module, a class or an object; read as it is stored, without binding."""

    owner: Any
    name: str

    def get(self) -> Any:
        """Return the value held there, or ``MISSING``."""
        if _is_proxy(self.owner):
            return getattr(self.owner, self.name)
        return vars(self.owner).get(self.name, MISSING)

    def put(self, value: Any) -> None:
        """Hold something else, or nothing."""
        if value is MISSING:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, value)

    def __str__(self) -> str:
        return f"{getattr(self.owner, '__name__', type(self.owner).__name__)}.{self.name}"


@dataclass(frozen=True, eq=False)
class Cell:
    """A variable of a closure."""

    cell: CellType

    def get(self) -> Any:
        """Return the value held there, or ``MISSING``."""
        try:
            return self.cell.cell_contents
        except ValueError:
            return MISSING

    def put(self, value: Any) -> None:
        """Hold something else."""
        self.cell.cell_contents = value


@dataclass(frozen=True, eq=False)
class Getter:
    """The getter of a property; the property is replaced, and the original restored on undo."""

    owner: type[Any]
    name: str
    original: property

    def get(self) -> Any:
        """Return the value held there, or ``MISSING``."""
        found = vars(self.owner).get(self.name)
        return found.fget if isinstance(found, property) else MISSING

    def put(self, value: Any) -> None:
        """Replace the property's getter."""
        made = self.original if value is self.original.fget else self.original.getter(value)
        setattr(self.owner, self.name, made)


Place = Attribute | Cell | Getter


def _is_proxy(value: Any) -> bool:
    # A proxy takes itself for what it wraps, and isinstance() believes it.
    return issubclass(type(value), BaseObjectProxy)


def inner_of(value: Any, name: str) -> Callable[..., Any] | None:
    """Return the function that a decorator wraps, or None if this is no decorated function.

    It is told by ``__wrapped__``, or else, where a decorator keeps nothing of what it decorates,
    by the name of a function in its closure or among its attributes.
    """
    value = plain(value)
    found = getattr(value, "__wrapped__", None)
    if callable(found):
        return found  # type: ignore[no-any-return]
    if getattr(value, "__name__", None) == name:
        return None
    for place in _held_by(value):
        held = plain(place.get())
        if isinstance(held, (FunctionType, MethodType)) and held.__name__ == name:
            return held
    return None


def plain(value: Any) -> Any:
    """Return the function in a static, class or bound method, or in a property."""
    if type(value) in {staticmethod, classmethod, MethodType}:
        return value.__func__
    return value.fget if type(value) is property else value


def places_in(value: Any, wanted: Any) -> list[Place]:
    """Return the places where a callable holds another one, so that it can be replaced."""
    return [place for place in _held_by(plain(value)) if place.get() is wanted]


def _held_by(value: Any) -> Iterator[Place]:
    if _is_proxy(value):
        yield Attribute(value, "__wrapped__")
        return
    if isinstance(value, FunctionType):
        yield from (Cell(cell) for cell in value.__closure__ or ())
    for name, held in list(getattr(value, "__dict__", {}).items()):
        if callable(held):
            yield Attribute(value, name)


def find_places(start: Place, wanted: Any) -> list[Place]:
    """Return the places where an object is held, at a place or in what wraps it there."""
    held = start.get()
    if held is wanted:
        return [start]
    found: list[Place] = []
    seen: list[Any] = []
    waiting = [plain(held)]
    while waiting and len(seen) < 64:  # noqa: PLR2004 - more decorators than anybody stacks
        value = waiting.pop()
        if value is MISSING or any(value is each for each in seen):
            continue
        seen.append(value)
        for place in _held_by(value):
            inner = place.get()
            if inner is wanted:
                found.append(place)
            elif inner is not MISSING and (isinstance(inner, FunctionType) or _is_proxy(inner)):
                waiting.append(inner)
    return found
