"""``atomic-claim migration``: the columns and indexes that a table's claims need."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from atomic_claim.job_table import JobTable
from atomic_claim.testing.database import CommandError

from .guarding import guard_step
from .indexes import INNODB
from .operations import NAMES, AddColumn, Operation, operations
from .options import JsonOption, UrlOption, plain_ending
from .sql import DialectsOption, chosen_dialects, show_sql
from .targets import TableOption, load_job_table
from .texts import DIALECTS

WIDTH = 100
HEADER = '''"""{title}

Revision ID: {revision}
Revises:{revises}

Made by: atomic-claim {command}
"""

{imports}
revision = "{revision}"
down_revision = {down_revision}
branch_labels = None
depends_on = None
'''


def migration(
    *,
    table: TableOption,
    add: Annotated[
        str,
        typer.Option(
            "--add",
            metavar="COLUMNS",
            help=f"Columns to add, separated by commas: {', '.join(NAMES)}.",
        ),
    ] = "",
    guard: Annotated[
        bool,
        typer.Option(
            "--guard",
            help="Add triggers by which the database refuses a second claim, for loops that "
            "nobody can patch.",
        ),
    ] = False,
    full_rows: Annotated[
        bool,
        typer.Option(
            "--full-rows",
            help="With --guard: somebody writes whole rows when only some other column than the "
            "state has changed.",
        ),
    ] = False,
    dialect: DialectsOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Write the revision into this folder, such as alembic/versions, after the one "
            "that is its newest.",
        ),
    ] = None,
    revises: Annotated[
        str | None,
        typer.Option(
            "--revises", metavar="ID", help="The revision that goes before, if --out cannot tell."
        ),
    ] = None,
    as_sql: Annotated[
        bool, typer.Option("--sql", help="Print plain SQL in place of an Alembic revision.")
    ] = False,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the migration that makes a table fit for its claims, without connecting.

    First come the columns, all nullable, then the indexes, made of the claim's own conditions and
    order in the form that each database can use, and built while others go on writing, then the
    guard. It is an Alembic revision with a downgrade, or plain SQL.
    """
    with plain_ending():
        if as_sql and out is not None:
            raise CommandError("--out writes an Alembic revision: leave out --sql")
        if full_rows and not guard:
            raise CommandError("--full-rows is about the guard: add --guard, or leave it out")
        names = chosen_dialects(dialect, url)
        wanted = _columns(add)
        job_table = load_job_table(table)
        steps = operations(job_table, wanted, names)
        if guard:
            added = [step for step in steps if isinstance(step, AddColumn)]
            steps.append(guard_step(job_table, added, names, full_rows=full_rows))
        if not steps:
            typer.echo("atomic-claim: nothing to migrate: the table declares it all", err=True)
        if as_sql:
            texts = {name: plain_sql(steps, name) for name in names}
            if as_json:
                found = {"table": job_table.table.fullname, "sql": texts}
                typer.echo(json.dumps(found, indent=2))
            else:
                show_sql(Console(), "\n\n".join(texts.values()))
            return
        before = _head(out) if out is not None and revises is None else revises
        command = f"migration --table {table}" + (f" --add {','.join(wanted)}" if wanted else "")
        command += " --guard" * guard + " --full-rows" * full_rows
        if len(names) < len(DIALECTS):
            command += "".join(f" --dialect {name}" for name in names)
        text, revision = revision_text(job_table, steps, names, command, before)
        path = None if out is None else _write(out, revision, job_table, text)
        if as_json:
            said = {
                "table": job_table.table.fullname,
                "revision": revision,
                "down_revision": before,
                "path": None if path is None else str(path),
                "text": text,
            }
            typer.echo(json.dumps(said, indent=2))
        else:
            typer.echo(text.rstrip() if path is None else path)


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


def revision_text(
    job_table: JobTable,
    steps: Sequence[Operation],
    names: Sequence[str],
    command: str,
    before: str | None,
) -> tuple[str, str]:
    """Render an Alembic revision; return it and its id, a hash of the contents."""
    up = "\n".join(_function("upgrade", steps, names, up=True))
    down = "\n".join(_function("downgrade", list(reversed(steps)), names, up=False))
    revision = hashlib.sha256(f"{before}{up}{down}".encode()).hexdigest()[:12]
    imports = ["import sqlalchemy as sa"] if any(isinstance(s, AddColumn) for s in steps) else []
    imports.append("from alembic import op")
    if any(isinstance(s, AddColumn) and "mysql." in s.source for s in steps):
        imports.append("from sqlalchemy.dialects import mysql")
    header = HEADER.format(
        title=f"Make {job_table.table.fullname} fit for its claims.",
        revision=revision,
        revises=f" {before}" if before else "",
        command=command,
        imports="\n".join([*imports, ""]),
        down_revision=_literal(before) if before else "None",
    )
    return f"{header}\n\n{up}\n\n\n{down}\n", revision


def _function(
    name: str, steps: Sequence[Operation], names: Sequence[str], *, up: bool
) -> Iterator[str]:
    """Yield the lines of ``upgrade`` or ``downgrade``."""
    yield f"def {name}() -> None:"
    yield f'    """{"Add what the claims need." if up else "Take it away again."}"""'
    body = [line for step in steps for line in _step(step, names, up=up)]
    if any("if dialect" in line for line in body):
        yield "    dialect = op.get_context().dialect.name"
    yield from (f"    {line}".rstrip() for line in body or ["pass"])


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
        said = f"== {_literal(group[0])}" if len(group) == 1 else f"in {_listed(group)}"
        yield f"{word} dialect {said}:"
        yield from (f"    {line}" for line in _executed(statements, 2, alone=alone))
        word = "elif"


def _undoing(step: Operation) -> str:
    return f"Undo: {step.comment[0].lower()}{step.comment[1:]}"


def _column(step: AddColumn, *, up: bool) -> Iterator[str]:
    schema = step.table.schema
    given = f", schema={_literal(schema)}" if schema else ""
    table, name = _literal(step.table.name), _literal(step.name)
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
        call = f"{indent}op.execute({_literal(text)})"
        if 4 * depth + len(call) <= WIDTH and "\n" not in text:
            yield call
            continue
        yield f"{indent}op.execute("
        # A line break in a string is two characters long.
        room = WIDTH - 4 * depth - len(indent) - (8 if "\n" in text else 6)
        for line in text.splitlines(keepends=True):
            yield from (f"{indent}    {_literal(part)}" for part in _pieces(line, room))
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


def _literal(text: str) -> str:
    """Return a string literal as Python's formatters write it."""
    found = json.dumps(text, ensure_ascii=False)
    return found if ast.literal_eval(found) == text else repr(text)


def _listed(names: Sequence[str]) -> str:
    return "{" + ", ".join(_literal(name) for name in names) + "}"


def _head(folder: Path) -> str | None:
    """Return the newest revision in a folder, or None if the folder has no revisions."""
    found: dict[str, set[str]] = {}
    for path in sorted(folder.glob("*.py")):
        assigned = dict(_assigned(path))
        if isinstance(revision := assigned.get("revision"), str):
            before = assigned.get("down_revision")
            parents = (before,) if isinstance(before, str) else before or ()
            assert isinstance(parents, (tuple, list))
            found[revision] = set(parents)
    heads = sorted(set(found) - {parent for parents in found.values() for parent in parents})
    if len(heads) > 1:
        raise CommandError(
            f"--out {folder}: it has several newest revisions ({', '.join(heads)}): name the one "
            "to go on from with --revises"
        )
    return heads[0] if heads else None


def _assigned(path: Path) -> Iterator[tuple[str, object]]:
    """Yield the constants that a file assigns at its top level."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, OSError) as error:
        raise CommandError(f"--out: {path} cannot be read: {error}; give --revises") from None
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign):
            targets = [node.target]
        for target in targets:
            value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
            if isinstance(target, ast.Name) and isinstance(value, (ast.Constant, ast.Tuple)):
                yield target.id, ast.literal_eval(value)


def _write(folder: Path, revision: str, job_table: JobTable, text: str) -> Path:
    slug = re.sub(r"\W+", "_", f"claims_of_{job_table.table.name}").lower()
    path = folder / f"{revision}_{slug}.py"
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise CommandError(f"--out: {path} is there already") from None
    except OSError as error:
        raise CommandError(f"--out {folder}: cannot be written: {error.strerror}") from None
    return path
