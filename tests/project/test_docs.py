"""No command and no option without its help, nor missing in the guide."""

import re
from itertools import pairwise
from typing import Any

import pytest

from tests.commands import Command
from tests.guides import GUIDES

pytestmark = pytest.mark.once

typer = pytest.importorskip("typer", reason="the extra 'cli' is not installed")

# The words of each command, without the names of its arguments, and its line.
LINES = [
    (tuple(word for word in shown.split()[1:] if word.islower()), line)
    for line, shown in re.findall(
        r"^(\| `(atomic-claim[^`]*)` \|.*)$", GUIDES["commands"], re.MULTILINE
    )
]
URL_VARIABLES = ["ATOMIC_CLAIM_URL", "DATABASE_URL"]


def walked(words: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the words of every command and its subcommands; the program itself has none."""
    found = the_command(words)
    below = getattr(found, "commands", {})
    return [words, *(each for name in below for each in walked((*words, name)))]


def the_command(words: tuple[str, ...]) -> Any:
    """Return the command for these words."""
    from atomic_claim.cli.app import app  # noqa: PLC0415 - needs typer

    found: Any = typer.main.get_command(app)
    for word in words:
        found = found.commands[word]
    return found


def documented(words: tuple[str, ...]) -> str:
    """Return the line for this command in the guide's table of commands."""
    (line,) = (line for shown, line in LINES if shown == words)
    return line


@pytest.mark.parametrize("words", walked(), ids=lambda words: " ".join(words) or "atomic-claim")
def test_help(words: tuple[str, ...], command: Command) -> None:
    """Every command, argument and option has its help, in 80 columns, and is in the guide."""
    found = the_command(words)
    assert found.help
    line = documented(words)
    ended = command(*words, "--help")
    assert ended.code == 0
    shown = re.sub(r"\x1b\[[\d;]*m", "", ended.out)
    assert all(len(line) <= 80 for line in shown.splitlines())
    for option in found.params:
        assert option.help, option.name
        is_option = option.param_type_name == "option"
        names = [*option.opts, *option.secondary_opts] if is_option else [option.metavar]
        for name in names:
            assert name in shown
            assert f"`{name}`" in line if is_option else name in line, name
        variables = [option.envvar] if isinstance(option.envvar, str) else option.envvar or []
        assert variables == URL_VARIABLES or "--url" not in names
        places = [shown.rindex(variable) for variable in variables]
        assert all(before < after for before, after in pairwise(places))


def test_the_guide_names_no_other() -> None:
    """The guide's table of commands has no command and no option that is not there."""
    assert sorted(shown for shown, _ in LINES) == sorted(walked())
    for words in walked():
        known = {name for option in the_command(words).params for name in option.opts}
        assert set(re.findall(r"`(--[\w-]+)`", documented(words))) <= known
