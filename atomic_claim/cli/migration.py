"""``atomic-claim migration``: the columns and indexes that a table's claims need."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from atomic_claim.job_table import JobTable
from atomic_claim.testing.database import CommandError

from .guarding import guard_step
from .indexes import INNODB
from .model_lines import model_lines
from .operations import ROLES, AddedColumn, Step, operations
from .options import Flag, JsonOption, UrlOption, console, plain_ending
from .sql import DialectsOption, chosen_dialects, show_sql
from .targets import TableOption, load_job_table
from .texts import DIALECTS, quoted_literal

WIDTH = 100
REVISION = '''"""{title}

Revision ID: {revision}
Revises:

Made by: atomic-claim {command}
"""

from alembic import op

revision = "{revision}"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add what the claims need."""
    {up}


def downgrade() -> None:
    """Take it away again."""
    {down}
'''
PROJECTS = (Path("alembic.ini"), Path("migrations/alembic.ini"))
FOR_THE_MODEL = "# For the model, so that Alembic's next autogenerate finds no difference:"


AddOption = Annotated[
    str,
    typer.Option(
        "--add",
        metavar="COLUMNS",
        help=f"Columns to add, separated by commas: {', '.join(ROLES)}.",
    ),
]
GuardOption = Annotated[
    bool,
    Flag(
        "--guard",
        help="Add triggers that refuse a second claim, for loops that cannot be patched.",
    ),
]
FullRowsOption = Annotated[
    bool,
    Flag(
        "--full-rows",
        help="With --guard: some programs write whole rows, with the state, when only another "
        "column changed.",
    ),
]
WriteOption = Annotated[
    bool,
    Flag(
        "--write",
        help="Create the revision in the Alembic project of the current directory, by its own "
        "template and behind its head, in place of printing it.",
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="With --write: Alembic's configuration. Left out, alembic.ini, pyproject.toml "
        "with [tool.alembic], or migrations/alembic.ini (Flask-Migrate's).",
    ),
]
SqlOption = Annotated[bool, Flag("--sql", help="Print plain SQL in place of an Alembic revision.")]


def migration(
    *,
    table: TableOption = None,
    add: AddOption = "",
    guard: GuardOption = False,
    full_rows: FullRowsOption = False,
    dialect: DialectsOption = None,
    write: WriteOption = False,
    config: ConfigOption = None,
    as_sql: SqlOption = False,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print the migration that a table needs for its claims.

    First come the columns, all nullable, then the indexes, made of the claim's own conditions and
    order in the form that each database can use, and built while others go on writing, then the
    guard. It is an Alembic revision with a downgrade, or plain SQL. Beside it (on standard error,
    if the revision is printed) stand the lines that the model needs for Alembic to find no
    difference.
    """
    with plain_ending():
        if as_sql and write:
            raise CommandError("--write creates an Alembic revision: leave out --sql")
        if full_rows and not guard:
            raise CommandError("--full-rows is about the guard: add --guard, or leave it out")
        names = chosen_dialects(dialect, url)
        wanted = _columns(add)
        given, job_table = load_job_table(table, url)
        steps = operations(job_table, wanted, names)
        if guard:
            added = [step.made for step in steps if isinstance(step.made, AddedColumn)]
            steps.append(guard_step(job_table, added, names, full_rows=full_rows))
        if not steps:
            typer.echo("atomic-claim: nothing to migrate: the table declares it all", err=True)
        if as_sql:
            _print_sql(job_table, steps, names, as_json=as_json)
            return
        command = _command(table, wanted, names, " --guard" * guard + " --full-rows" * full_rows)
        revision = Revision(steps, names)
        text = revision.text(job_table, command)
        path = _write(config, job_table, revision) if write else None
        model = model_lines(given, table or "", steps)
        _print_revision(job_table, revision, text, path, model, as_json=as_json)


def _command(table: str | None, wanted: Sequence[str], names: Sequence[str], flags: str) -> str:
    """Return the command that makes the same revision again."""
    command = "migration" + (f" --table {table}" if table else "")
    command += f" --add {','.join(wanted)}" if wanted else ""
    databases = names if len(names) < len(DIALECTS) else ()
    return command + flags + "".join(f" --dialect {name}" for name in databases)


def _print_sql(
    job_table: JobTable, steps: Sequence[Step], names: Sequence[str], *, as_json: bool
) -> None:
    texts = {name: plain_sql(steps, name) for name in names}
    if as_json:
        typer.echo(json.dumps({"table": job_table.table.fullname, "sql": texts}, indent=2))
    else:
        show_sql(console(), "\n\n".join(texts.values()))


def _print_revision(
    job_table: JobTable,
    revision: Revision,
    text: str,
    path: Path | None,
    model: Sequence[str],
    *,
    as_json: bool,
) -> None:
    """Print the revision, or the path that it was written to, and the model's lines."""
    if as_json:
        said = {
            "table": job_table.table.fullname,
            "revision": revision.id,
            "path": None if path is None else str(path),
            "text": text if path is None else path.read_text(encoding="utf-8"),
            "model": model,
        }
        typer.echo(json.dumps(said, indent=2))
        return
    typer.echo(text.rstrip() if path is None else path)
    if model:
        typer.echo("\n".join([FOR_THE_MODEL, *model]), err=path is None)


def _columns(given: str) -> list[str]:
    wanted = [name.strip() for name in given.split(",") if name.strip()]
    for name in wanted:
        if name not in ROLES:
            raise CommandError(f"--add {name}: expected some of {', '.join(ROLES)}, with commas")
    return list(dict.fromkeys(wanted))


def plain_sql(steps: Sequence[Step], name: str) -> str:
    """Render the statements of a migration, and those that undo it as comments."""
    lines = [f"-- {name}"]
    for step in steps:
        if statements := step.up.get(name):
            alone = " Not inside a transaction." if name in step.alone else ""
            lines += [f"-- {step.comment}{alone}", *(_ended(each, name) for each in statements)]
    lines.append("-- To undo it:")
    lines += [f"-- {each};" for step in reversed(steps) for each in step.down.get(name, ())]
    return "\n".join(lines)


def _ended(statement: str, name: str) -> str:
    """Terminate a statement as the database's command-line client expects it in a file."""
    if name in INNODB and ";" in statement:
        # That client ends a statement at any semicolon, unless it is told of another end.
        return f"DELIMITER //\n{statement}//\nDELIMITER ;"
    return f"{statement};"


class Revision:
    """The contents of an Alembic revision.

    Attributes:
        up: the body of ``upgrade``.
        down: the body of ``downgrade``.
        id: a hash of both.
    """

    def __init__(self, steps: Sequence[Step], names: Sequence[str]) -> None:
        self.up = _body({name: list(_upgrade(steps, name)) for name in names})
        self.down = _body({name: list(_downgrade(steps, name)) for name in names})
        self.id = hashlib.sha256(f"{self.up}\n{self.down}".encode()).hexdigest()[:12]

    def text(self, job_table: JobTable, command: str) -> str:
        """Render a file that stands for itself."""
        return REVISION.format(
            title=f"Make {job_table.table.fullname} fit for its claims.",
            revision=self.id,
            command=command,
            up=self.up,
            down=self.down,
        )


def _upgrade(steps: Sequence[Step], name: str) -> Iterator[tuple[str, Sequence[str], bool]]:
    for step in steps:
        yield step.comment, step.up.get(name, ()), name in step.alone


def _downgrade(steps: Sequence[Step], name: str) -> Iterator[tuple[str, Sequence[str], bool]]:
    for step in reversed(steps):
        comment = f"Undo: {step.comment[0].lower()}{step.comment[1:]}"
        yield comment, step.down.get(name, ()), name in step.alone


def _body(of_each: Mapping[str, Sequence[tuple[str, Sequence[str], bool]]]) -> str:
    """Return the body of a function; databases with the same statements share a branch."""
    depth = 1 if len(of_each) == 1 else 2
    branches: dict[str, list[str]] = {}
    for name, steps in of_each.items():
        lines = [line for step in steps if step[1] for line in _calls(*step, depth)]
        branches.setdefault("\n".join(lines), []).append(name)
    if depth == 1 or not any(branches):
        return "".join(branches).strip() or "pass"
    body, word = "dialect = op.get_context().dialect.name", "if"
    for branch, names in branches.items():
        if branch:
            said = ", ".join(map(quoted_literal, names))
            test = f"== {said}" if len(names) == 1 else f"in {{{said}}}"
            body += f"\n    {word} dialect {test}:\n{branch}"
            word = "elif"
    return body


def _calls(comment: str, statements: Sequence[str], is_alone: bool, depth: int) -> Iterator[str]:
    """Yield the lines that execute the statements of a step."""
    indent = "    " * depth
    yield f"{indent}# {comment}"
    if is_alone:
        yield f"{indent}# CONCURRENTLY stops no writer, and cannot be part of a transaction."
        yield f"{indent}with op.get_context().autocommit_block():"
        indent += "    "
    for statement in statements:
        # Alembic would take a colon in a string for a parameter.
        text = statement.replace(":", r"\:")
        call = f"{indent}op.execute({quoted_literal(text)})"
        if len(call) <= WIDTH and "\n" not in text:
            yield call
            continue
        yield f"{indent}op.execute("
        # A line break in a string is two characters long.
        room = WIDTH - len(indent) - (8 if "\n" in text else 6)
        for line in text.splitlines(keepends=True):
            yield from (f"{indent}    {quoted_literal(part)}" for part in _pieces(line, room))
        yield f"{indent})"


def _pieces(text: str, room: int) -> Iterator[str]:
    """Split the text after spaces into pieces that fit into the room."""
    piece = ""
    for word in re.findall(r"\S*\s*", text):
        if piece and len(piece) + len(word) > room:
            yield piece
            piece = ""
        piece += word
    yield piece


def _write(config: Path | None, job_table: JobTable, revision: Revision) -> Path:
    """Create the revision as the project's ``alembic revision`` would.

    Raises:
        CommandError: there is no Alembic, or no project of Alembic's, or it has several heads.
    """
    try:
        from alembic.config import Config  # noqa: PLC0415 - an extra of the user's
        from alembic.script import ScriptDirectory  # noqa: PLC0415
        from alembic.util import CommandError as Refusal  # noqa: PLC0415
    except ImportError:
        raise CommandError("--write needs Alembic: pip install alembic") from None
    found = config or next((path for path in PROJECTS if path.is_file()), None)
    if found is None and _is_configured(Path("pyproject.toml")):
        found = Path("pyproject.toml")
    if found is None or not found.is_file():
        said = "there is no alembic.ini here; name one with" if found is None else "there is no"
        raise CommandError(f"--write: {said} --config {found or 'FILE'}")
    quiet = Namespace(quiet=True)
    is_toml = found.suffix == ".toml"
    settings = Config(
        None if is_toml else found, toml_file=found if is_toml else None, cmd_opts=quiet
    )
    if not is_toml and settings.get_main_option("script_location") is None:
        # So it is with Flask-Migrate, which says it when it runs.
        settings.set_main_option("script_location", str(found.parent))
    try:
        folder = ScriptDirectory.from_config(settings)
        script = folder.generate_revision(
            revision.id,
            f"claims of {job_table.table.name}",
            upgrades=revision.up,
            downgrades=revision.down,
        )
    except Refusal as error:
        raise CommandError(f"--write: {error}") from None
    assert script is not None
    return Path(script.path)


def _is_configured(path: Path) -> bool:
    if not path.is_file():
        return False
    return "alembic" in tomllib.loads(path.read_text(encoding="utf-8")).get("tool", {})
