"""The command ``atomic-claim``; the only part of the package that needs Typer and Rich."""

from __future__ import annotations

import sys
from io import TextIOWrapper

EXTRA = ("typer", "rich")


def main() -> None:
    """Run the command, or name the extra that it needs."""
    try:
        # Worker processes import this package too, and have no use for Typer.
        from .app import app  # noqa: PLC0415
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in EXTRA:
            raise
        sys.stderr.write(
            f"atomic-claim: the commands need {' and '.join(EXTRA)} "
            f"({error}): pip install 'atomic-claim[cli]'\n"
        )
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # A name that the terminal's encoding lacks is shown escaped.
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="atomic-claim")
