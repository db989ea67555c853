"""The startup hook that ``atomic-claim run`` adds to every Python process of a program."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path
from typing import NoReturn

from atomic_claim.errors import ClaimError

from . import main_module, patches
from .file import load_patches

FILE = "ATOMIC_CLAIM_PATCHES"
PROCESS = "ATOMIC_CLAIM_PROCESS"
"""The process that the command became; patches for what it cannot import are an error there."""
BOOTSTRAP = Path(__file__).parent / "bootstrap"
UNUSABLE = 2


def environment(path: Path, given: dict[str, str]) -> dict[str, str]:
    """Return the environment for a program that is to be patched from a file."""
    others = [part for part in given.get("PYTHONPATH", "").split(os.pathsep) if part]
    return {
        **given,
        FILE: str(path.resolve()),
        PROCESS: str(os.getpid()),
        "PYTHONPATH": os.pathsep.join([str(BOOTSTRAP), *others]),
    }


def start() -> None:
    """Make the patches of the file that the environment names."""
    path = os.environ.get(FILE)
    if not path:
        return
    patches.on_failure = end
    name = main_module.main_name()
    if name:
        os.environ[main_module.VARIABLE] = name
    # The folder of the program comes onto the path only after this, and console scripts (flask,
    # gunicorn, celery) put the working directory there themselves.
    before = sys.path[:]
    sys.path[:0] = dict.fromkeys([_folder(), str(Path.cwd())])
    try:
        load_patches(path, skip_missing=os.environ.get(PROCESS) != str(os.getpid()))
    except ClaimError as error:
        end(error)
    finally:
        sys.path[:] = before


def _folder() -> str:
    first = sys.argv[0] if sys.argv else ""
    if first in {"", "-c", "-m"}:
        return str(Path.cwd())
    return str(Path(first).resolve().parent)


def end(error: BaseException) -> NoReturn:
    """End the program with one line: it must not go on without its patches."""
    sys.stdout.flush()
    sys.stderr.write(f"atomic-claim: {' '.join(str(error).split())}\n")
    sys.stderr.flush()
    # Within an import or Python's own start, an exception would come out as a traceback.
    os._exit(UNUSABLE)


def load_next(folder: str) -> None:
    """Run the ``sitecustomize`` that stands behind ours on the path, as it would have been."""
    others = [each for each in sys.path if Path(each or ".").resolve() != Path(folder).resolve()]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)
