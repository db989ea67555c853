"""The option ``--svg``: whether a picture can be drawn, and the drawing of it."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from atomic_claim.testing.database import CommandError
from atomic_claim.testing.results import Counted

PICTURES = (".svg", ".png")

SvgOption = Annotated[
    Path | None,
    typer.Option(
        "--svg",
        metavar="FILE",
        help="Draw both runs as a timeline into this file, .svg or .png (needs the extra 'plot').",
    ),
]


def check_picture(path: Path) -> None:
    """Find out before the work whether the picture can be drawn after it.

    Raises:
        CommandError: it cannot.
    """
    if path.suffix.lower() not in PICTURES:
        raise CommandError(f"--svg {path}: expected a name that ends in {' or '.join(PICTURES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise CommandError("--svg needs matplotlib: pip install 'atomic-claim[plot]'")
    try:
        if path.exists():
            if not path.is_file() or not os.access(path, os.W_OK):
                raise CommandError(f"--svg {path}: it is there and cannot be written")
        else:
            with tempfile.TemporaryFile(dir=path.parent):
                pass
    except OSError as error:
        raise CommandError(f"--svg {path}: cannot be written: {error.strerror}") from None


def draw_picture(path: Path, title: str, results: Sequence[Counted]) -> None:
    """Draw the results into the file.

    Raises:
        CommandError: it cannot be written.
    """
    # Matplotlib takes half a second to import, and is an extra.
    from .picture import draw  # noqa: PLC0415

    try:
        draw(path, title, results)
    except OSError as error:
        raise CommandError(f"--svg {path}: cannot be written: {error.strerror}") from None
