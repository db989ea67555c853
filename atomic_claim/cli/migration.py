"""``atomic-claim migration``: the columns and indexes that a table's claims need."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer

from atomic_claim.job_table import JobTable
from atomic_claim.testing.database import CommandError

from .guarding import guard_step
from .indexes import INNODB
from .model_lines import model_lines
from .operations import NAMES, AddColumn, Operation, operations
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

{imports}

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
        help=f"Columns to add, separated by commas: {', '.join(NAMES)}.",
    ),
]
GuardOption = Annotated[
    bool,
    Flag(
        "--guard",
        help="Add triggers by which the database refuses a second claim, for loops that "
        "nobody can patch.",
    ),
]
FullRowsOption = Annotated[
    bool,
    Flag(
        "--full-rows",
        help="With --guard: somebody writes whole rows when only some other column than the "
        "state has changed.",
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
    """Print the migration that makes a table fit for its claims.

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
            added = [step for step in steps if isinstance(step, AddColumn)]
            steps.append(guard_step(job_table, added, names, full_rows=full_rows))
        if not steps:
            typer.echo("atomic-claim: nothing to migrate: the table declares it all", err=True)
        if as_sql:
            _print_sql(job_table, steps, names, as_json=as_json)
            return
        command = _command(table, wanted, names, " --guard" * guard + " --full-rows" * full_rows)
        revision = Revision.of(steps, names)
        text = revision.text(job_table, command)
        path = _write(config, job_table, revision) if write else None
        model = model_lines(given, table or "", steps, names)
        _print_revision(job_table, revision, text, path, model, as_json=as_json)


def _command(table: str | None, wanted: Sequence[str], names: Sequence[str], flags: str) -> str:
    """Return the command that makes the same revision again."""
    command = "migration" + (f" --table {table}" if table else "")
    command += f" --add {','.join(wanted)}" if wanted else ""
    databases = names if len(names) < len(DIALECTS) else ()
    return command + flags + "".join(f" --dialect {name}" for name in databases)


def _print_sql(
    job_table: JobTable, steps: Sequence[Operation], names: Sequence[str], *, as_json: bool
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
    model: str,
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
            "model": model.splitlines(),
        }
        typer.echo(json.dumps(said, indent=2))
        return
    typer.echo(text.rstrip() if path is None else path)
    if model:
        typer.echo(f"{FOR_THE_MODEL}\n{model}", err=path is None)


def _columns(given: str) -> list[str]:
    wanted = [name.strip() for name in given.split(",") if name.strip()]
    for name in wanted:
        if name not in NAMES:
            raise CommandError(f"--add {name}: expected some of {', '.join(NAMES)}, with commas")
    return list(dict.fromkeys(wanted))


def plain_sql(steps: Sequence[Operation], name: str) -> str:
    """Render the statements of a migration, and those that undo it as comments."""
    lines = [f"-- {name}"]
    for step in steps:
        if statements := step.up(name):
            alone = " Not inside a transaction." if step.is_alone(name) else ""
            lines += [f"-- {step.comment}{alone}", *(_ended(each, name) for each in statements)]
    lines.append("-- To undo it:")
    lines += [f"-- {each};" for step in reversed(steps) for each in step.down(name)]
    return "\n".join(lines)


def _ended(statement: str, name: str) -> str:
    """Terminate a statement as the database's command-line client expects it in a file."""
    if name in INNODB and ";" in statement:
        # That client ends a statement at any semicolon, unless it is told of another end.
        return f"DELIMITER //\n{statement}//\nDELIMITER ;"
    return f"{statement};"


@dataclass(frozen=True)
class Revision:
    """The contents of an Alembic revision.

    Attributes:
        up: the lines of ``upgrade``.
        down: the lines of ``downgrade``.
        imports: the lines of its imports, without those of Alembic's own template.
    """

    up: tuple[str, ...]
    down: tuple[str, ...]
    imports: tuple[str, ...]

    @classmethod
    def of(cls, steps: Sequence[Operation], names: Sequence[str]) -> Revision:
        """Build the revision of some steps."""
        needs_mysql = any(isinstance(s, AddColumn) and "mysql." in s.source for s in steps)
        imports = ("from sqlalchemy.dialects import mysql",) if needs_mysql else ()
        down = tuple(_body(list(reversed(steps)), names, up=False))
        return cls(tuple(_body(steps, names, up=True)), down, imports)

    @property
    def id(self) -> str:
        """A hash of the contents."""
        return hashlib.sha256("\n".join((*self.up, *self.down)).encode()).hexdigest()[:12]

    def text(self, job_table: JobTable, command: str) -> str:
        """Render a file that stands for itself."""
        uses_sa = any("sa." in line for line in self.up)
        return REVISION.format(
            title=f"Make {job_table.table.fullname} fit for its claims.",
            revision=self.id,
            command=command,
            imports="\n".join(
                [*["import sqlalchemy as sa"] * uses_sa, "from alembic import op", *self.imports]
            ),
            up=indented(self.up),
            down=indented(self.down),
        )


def indented(lines: Sequence[str]) -> str:
    """Return the body of a function, whose first line has its indentation already."""
    return "\n    ".join(lines).replace("\n    \n", "\n\n")


def _body(steps: Sequence[Operation], names: Sequence[str], *, up: bool) -> Iterator[str]:
    """Yield the lines of ``upgrade`` or ``downgrade``."""
    body = [line for step in steps for line in _step(step, names, up=up)]
    if any("if dialect" in line for line in body):
        yield "dialect = op.get_context().dialect.name"
    yield from (line.rstrip() for line in body or ["pass"])


def _step(step: Operation, names: Sequence[str], *, up: bool) -> Iterator[str]:
    yield f"# {step.comment if up else _undoing(step)}"
    if isinstance(step, AddColumn):
        yield from _column(step, up=up)
        return
    of_each = {name: tuple(step.up(name) if up else step.down(name)) for name in names}
    groups = [
        (list(group), statements, alone)
        for (statements, alone), group in groupby(
            names, key=lambda name: (of_each[name], step.is_alone(name))
        )
    ]
    if len(groups) == 1:
        _, statements, alone = groups[0]
        yield from _executed(statements, 1, alone=alone)
        return
    word = "if"
    for group, statements, alone in groups:
        if not statements:
            continue
        said = f"== {quoted_literal(group[0])}" if len(group) == 1 else f"in {_listed(group)}"
        yield f"{word} dialect {said}:"
        yield from (f"    {line}" for line in _executed(statements, 2, alone=alone))
        word = "elif"


def _undoing(step: Operation) -> str:
    return f"Undo: {step.comment[0].lower()}{step.comment[1:]}"


def _column(step: AddColumn, *, up: bool) -> Iterator[str]:
    schema = step.table.schema
    given = f", schema={quoted_literal(schema)}" if schema else ""
    table, name = quoted_literal(step.table.name), quoted_literal(step.name)
    if not up:
        yield f"op.drop_column({table}, {name}{given})"
        return
    column = f"sa.Column({name}, {step.source}, nullable=True)"
    call = f"op.add_column({table}, {column}{given})"
    if 4 + len(call) <= WIDTH:
        yield call
        return
    yield from ("op.add_column(", f"    {table},", "    sa.Column(", f"        {name},")
    yield from (f"        {step.source},", "        nullable=True,", "    ),")
    if given:
        yield f"    {given.removeprefix(', ')},"
    yield ")"


def _executed(statements: Sequence[str], depth: int, *, alone: bool) -> Iterator[str]:
    indent = ""
    if alone:
        yield "# CONCURRENTLY stops no writer, and cannot be part of a transaction."
        yield "with op.get_context().autocommit_block():"
        indent = "    "
    for statement in statements:
        # Alembic would take a colon in a string for a parameter.
        text = statement.replace(":", r"\:")
        call = f"{indent}op.execute({quoted_literal(text)})"
        if 4 * depth + len(call) <= WIDTH and "\n" not in text:
            yield call
            continue
        yield f"{indent}op.execute("
        # A line break in a string is two characters long.
        room = WIDTH - 4 * depth - len(indent) - (8 if "\n" in text else 6)
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


def _listed(names: Sequence[str]) -> str:
    return "{" + ", ".join(quoted_literal(name) for name in names) + "}"


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
            upgrades=indented(revision.up),
            downgrades=indented(revision.down),
            imports="\n".join(revision.imports),
        )
    except Refusal as error:
        raise CommandError(f"--write: {error}") from None
    assert script is not None
    return Path(script.path)


def _is_configured(path: Path) -> bool:
    if not path.is_file():
        return False
    return "alembic" in tomllib.loads(path.read_text(encoding="utf-8")).get("tool", {})
