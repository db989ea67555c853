"""The modules of a program, and its main one, whose functions no import ever brings."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from importlib.machinery import PathFinder
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from atomic_claim.errors import PatchError

MAINS = ("__main__", "__mp_main__")
VARIABLE = "ATOMIC_CLAIM_MAIN"
"""Tells the processes that multiprocessing starts what their parent's main module is called."""

Ready = Callable[[ModuleType, bool], bool]
waiting: list[Ready] = []
"""What is yet to be patched in the main module; each tells whether it is done, by its end too."""


class MissingModule(PatchError):
    """The module of a target cannot be imported."""


def check_module(name: str) -> None:
    """Refuse a module that cannot be imported; its packages are not imported for it.

    Raises:
        MissingModule: there is no such module.
    """
    above: Iterable[str] | None = None
    names = name.split(".")
    for depth in range(1, len(names) + 1):
        part = ".".join(names[:depth])
        if (loaded := sys.modules.get(part)) is not None:
            above = getattr(loaded, "__path__", ())
            continue
        path = None if above is None else list(above)
        # An editable installation brings a finder of its own.
        finds = [getattr(finder, "find_spec", None) for finder in (PathFinder, *sys.meta_path)]
        found = next((spec for find in finds if find and (spec := find(part, path))), None)
        if found is None:
            raise MissingModule(
                f"there is no module {name!r} on this Python's path, so it cannot be patched: "
                "install it, or correct its name"
            )
        above = found.submodule_search_locations or ()


def is_importing(complete: str, name: str | None = None) -> bool:
    """Check whether a module is being imported, or any is, besides one that is known to be over."""
    return any(
        getattr(getattr(module, "__spec__", None), "_initializing", False)
        for each, module in list(sys.modules.items())
        if each != complete and name in {None, each}
    )


def main_name() -> str:
    """Return the name to import the main module by, or "" if it is unknown."""
    first = sys.argv[0] if sys.argv else ""
    if first == "-c":
        return os.environ.get(VARIABLE, "")
    if first == "-m":
        words = iter(sys.orig_argv[1:])
        given = next((word for word in words if word.startswith("-m")), "")
        return given.removeprefix("-m") or next(words, "")
    main = sys.modules.get("__main__")
    if (spec := getattr(main, "__spec__", None)) is not None:
        return str(spec.name)
    return Path(first).stem


def is_main(name: str) -> bool:
    """Check whether a module of this name is the main module."""
    known = main_name()
    return name in MAINS or (bool(known) and name in {known, f"{known}.__main__"})


def loaded_module(name: str) -> ModuleType | None:
    """Return the loaded module of this name, even if it is the main module, or None."""
    if (found := sys.modules.get(name)) is not None:
        return found
    if not is_main(name):
        return None
    main = sys.modules.get("__mp_main__", sys.modules["__main__"])
    return main if hasattr(main, "__file__") else None


def when_defined(ready: Ready) -> None:
    """Trace the main module line by line until something is defined there.

    Only the main module's own lines are watched, and only until all is found: what a function
    costs that is called meanwhile is one look at its name. What is not defined by its end is
    an error.
    """
    if not waiting:
        if sys.gettrace() is not None:
            raise PatchError(
                "a debugger or a coverage tool traces this program, so its main module cannot be "
                "watched: move the functions into a module that it imports, or run it without"
            )
        sys.settrace(_enter)
    waiting.append(ready)


def _enter(frame: FrameType, _event: str, _arg: Any) -> Any:
    if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") in MAINS:
        return _line
    return None


def _line(frame: FrameType, kind: str, _arg: Any) -> Any:
    module = sys.modules.get(frame.f_globals["__name__"])
    if module is None or vars(module) is not frame.f_globals:
        return _line
    # What multiprocessing starts by -c is not yet the program's own main module.
    is_over = kind == "return" and hasattr(module, "__file__")
    waiting[:] = [ready for ready in waiting if not ready(module, is_over)]
    if waiting:
        return _line
    sys.settrace(None)
    return None
