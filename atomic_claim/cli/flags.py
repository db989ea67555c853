"""Messages of the library, which name its parameters, in the words of a command."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from atomic_claim.testing.database import CommandError

FLAGS = {
    "target": "TARGET",
    "table": "--table",
    "url": "--url",
    "jobs": "--jobs",
    "factory": "--factory",
    "call": "--call",
    "timeout": "--timeout",
    "use_existing_table": "--use-existing-table",
}
# Only a word of its own: `?timeout=3` in a URL is none of ours.
PARAMETER = re.compile(rf"(?<![^\s(])({'|'.join(FLAGS)})=(True\b|\w)?")


@contextmanager
def naming_flags() -> Iterator[None]:
    """Name the flags in errors of the library, in place of its parameters."""
    try:
        yield
    except CommandError as error:
        raise CommandError(PARAMETER.sub(_flag, str(error))) from None


def _flag(found: re.Match[str]) -> str:
    flag, value = FLAGS[found[1]], found[2]
    return flag if value in {None, "True"} else f"{flag} {value}"
