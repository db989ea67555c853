"""The option ``--svg``: whether a picture can be drawn, and the drawing of it."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Annotated

import typer

from atomic_claim.testing.database import CommandError

PICTURES = (".svg", ".png")

SvgOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Draw both runs as a timeline into this file, .svg or .png (needs the extra 'plot').",
    ),
]


def check_picture(path: Path | None) -> None:
    """Find out before the work whether the picture, if there is one, can be drawn after it.

    Raises:
        CommandError: it cannot.
    """
    if path is None:
        return
    if path.suffix.lower() not in PICTURES:
        raise CommandError(f"--svg {path}: expected a name that ends in {' or '.join(PICTURES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise CommandError("--svg needs matplotlib: pip install 'atomic-claim[plot]'")
    is_file = path.is_file() and os.access(path, os.W_OK)
    if not (is_file if path.exists() else os.access(path.parent, os.W_OK | os.X_OK)):
        raise CommandError(f"--svg {path}: cannot be written")
