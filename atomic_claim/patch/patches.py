"""A patch: put in place, counted, and taken back without a trace."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, Self

from wrapt import register_post_import_hook

from atomic_claim.errors import ClaimError

from .calls import Call, bound_call
from .holders import MISSING, Attribute, Place, find_places
from .main_module import check_module, is_main, loaded_module, when_defined
from .targets import PatchWrapper, Target, named_target, object_target, parts_of

on_failure: Callable[[ClaimError], Any] | None = None
"""What ends a program that was started to be patched, and cannot be."""

Run = Callable[[Call, Callable[[], Any]], Any]
"""Runs in place of a function: gets the bound call, and what runs the original."""
Prepare = Callable[["Patch", Target], Run]


class Patch:
    """A legacy callable replaced in place; also a context manager that undoes it at its end.

    Attributes:
        target: what is patched, as ``"module:Class.method"``.
        calls: how often the patched callable was called.
        claimed: how many jobs its calls have claimed.
        passed_through: how many calls were none of the patch's business, and went to the original.
        overrides: methods of subclasses that stand in place of a patched one, and are not patched.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.calls = 0
        self.claimed = 0
        self.passed_through = 0
        self.overrides: tuple[str, ...] = ()
        self.is_active = True
        self._installed: list[tuple[Place, bool, PatchWrapper]] = []
        self._ends: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        state = "" if self._installed else ", not yet imported" if self.is_active else ", undone"
        return (
            f"<Patch of {self.target}{state}: {self.calls} calls, {self.claimed} claimed, "
            f"{self.passed_through} passed through>"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    @property
    def is_installed(self) -> bool:
        """Check whether the target is patched; False until its module is imported."""
        return bool(self._installed)

    def undo(self) -> None:
        """Put back exactly what was there, wherever it is held by now.

        Wrappers that others have put around it since stay, around the original. Where such a
        wrapper keeps the patched function out of reach, that becomes a mere passage to the
        original. To undo twice does nothing.
        """
        self.is_active = False
        while self._installed:
            place, created, wrapper = self._installed.pop()
            for found in find_places(place, wrapper):
                is_root = found is place
                found.put(MISSING if created and is_root else wrapper.__wrapped__)
        while self._ends:
            self._ends.pop()()

    def at_undo(self, end: Callable[[], None]) -> None:
        """Register a function that is called when the patch is undone."""
        self._ends.append(end)

    def count(self, *, calls: int = 0, claimed: int = 0, passed_through: int = 0) -> None:
        """Count, whichever thread it is."""
        with self._lock:
            self.calls += calls
            self.claimed += claimed
            self.passed_through += passed_through

    def install(self, target: Target, prepare: Prepare) -> None:
        """Replace the target, and warn of what looks like it and is not replaced."""
        wrapper = PatchWrapper(target.wrapped, guarded(self, target, prepare), self)
        for place in target.places:
            created = isinstance(place, Attribute) and place.get() is MISSING
            place.put(wrapper)
            self._installed.append((place, created, wrapper))
        self.target = target.name
        self.overrides = tuple(target.overrides)
        for what, names in (
            ("these override it, each to be patched if it does not call super()", target.overrides),
            ("these names for it, bound before, are not", target.unpatched),
        ):
            if names:
                which = f"{what}: {', '.join(names)}"
                warnings.warn(f"{target.name} is patched, and {which}", stacklevel=4)


def make_patch(given: Any, prepare: Prepare) -> Patch:
    """Patch a target, now or as soon as its module is imported.

    Args:
        given: ``"module:Class.method"``, or the object itself.
        prepare: checks the options against the target, and returns what runs in its place.

    Raises:
        PatchError: the target or the options do not fit.
    """
    if not isinstance(given, str):
        target = object_target(given)
        patch = Patch(target.name)
        patch.install(target, prepare)
        return patch
    module_name, path = parts_of(given)
    patch = Patch(given)

    def install(module: ModuleType, *, is_over: bool = True) -> None:
        if not patch.is_active:
            return
        try:
            target = named_target(module, path)
            target.is_over = is_over
            patch.install(target, prepare)
        except ClaimError as error:
            if on_failure is not None:
                on_failure(error)
            raise

    def install_in_main(module: ModuleType, is_over: bool) -> bool:
        if is_over or hasattr(module, path.partition(".")[0]):
            install(module, is_over=False)
            return True
        return not patch.is_active

    if (module := loaded_module(module_name)) is not None:
        install(module, is_over=False)
        return patch
    if is_main(module_name):
        when_defined(install_in_main)
    else:
        check_module(module_name)
    register_post_import_hook(install, module_name)
    return patch


def guarded(patch: Patch, target: Target, prepare: Prepare) -> Callable[..., Any]:
    """Return a wrapper that runs the patch while it is active, the original otherwise.

    So it does where the arguments do not fit the function's signature.
    """
    run = prepare(patch, target)

    def call(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not patch.is_active:
            return wrapped(*args, **kwargs)
        patch.count(calls=1)
        original = partial(wrapped, *args, **kwargs)
        bound = bound_call(target.signature, instance, args, kwargs)
        if bound is None:
            patch.count(passed_through=1)
            return original()
        return run(bound, original)

    return call
