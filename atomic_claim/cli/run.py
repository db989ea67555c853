"""``atomic-claim run``: a program with its patches, its source as it is."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from atomic_claim.patch.file import SECTION, find_file, read_file
from atomic_claim.patch.start import FILE, environment
from atomic_claim.testing.database import CommandError


def run(
    *,
    command: Annotated[
        list[str],
        typer.Argument(metavar="-- COMMAND...", help="The program and its arguments."),
    ],
    patches: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            envvar=FILE,
            help="The TOML file with the patches. Default: the nearest pyproject.toml with "
            "[tool.atomic_claim.patches], in this folder or above.",
        ),
    ] = None,
) -> None:
    """Run a program with its legacy functions patched and its source unchanged.

    The patches are read from a TOML file and made whenever a module they name is imported, in
    every Python process that the program starts: by `python script.py`, `python -m module`, the
    scripts of installed packages, and their children. An option of Python that ignores PYTHONPATH
    (-I, -E) keeps them out.

    The exit code is the program's, or 2 if it could not be run or a patch does not fit.
    """
    path = find_file(Path.cwd()) if patches is None else patches
    if path is None:
        raise CommandError(
            f"no pyproject.toml from here upwards has a [{SECTION}]: write one, or name a "
            "file with --patches"
        )
    read_file(path)
    program = shutil.which(command[0])
    if program is None:
        raise CommandError(f"there is no command {command[0]!r} on the PATH")
    sys.stdout.flush()
    os.execve(program, command, environment(path, dict(os.environ)))  # noqa: S606 - as asked
