"""``atomic-claim migration``: the columns and indexes that a table's claims need."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from atomic_claim.job_table import JobTable
from atomic_claim.testing.database import CommandError

from .guarding import guard_step
from .indexes import INNODB
from .model_lines import model_lines
from .operations import ROLES, AddedColumn, Step, operations
from .options import Flag, JsonOption, UrlOption, console
from .sql import DialectsOption, chosen_dialects, show_sql
from .targets import TableOption, chosen, load_job_table, name_of
from .texts import DIALECTS, quoted_literal

WIDTH = 100
PROJECTS = (Path("alembic.ini"), Path("migrations/alembic.ini"))
FOR_THE_MODEL = "# For the model, so that Alembic's next autogenerate finds no difference:"


AddOption = Annotated[
    str,
    typer.Option(
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
        help="Create the revision after the head of the Alembic project in the current "
        "directory, with its template, in place of printing it.",
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
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
    found: dict[str, Any] = {"table": job_table.table.fullname}
    if as_sql:
        found["sql"] = {name: plain_sql(steps, name) for name in names}
    else:
        flags = " --guard" * guard + " --full-rows" * full_rows
        command = _command(table, wanted, names, flags)
        found |= _revision(job_table, steps, names, command, config=config, write=write)
        found["model"] = model_lines(given, name_of(chosen(table)), steps)
    _print(found, as_json=as_json)


def _print(found: dict[str, Any], *, as_json: bool) -> None:
    """Print the SQL, or the revision or its path, and beside it the lines for the model."""
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    elif "sql" in found:
        show_sql(console(), "\n\n".join(found["sql"].values()))
    else:
        typer.echo(found["path"] or found["text"].rstrip())
        if found["model"]:
            typer.echo("\n".join([FOR_THE_MODEL, *found["model"]]), err=not found["path"])


def _command(table: str | None, wanted: Sequence[str], names: Sequence[str], flags: str) -> str:
    """Return the command that makes the same revision again."""
    command = "migration" + (f" --table {table}" if table else "")
    command += f" --add {','.join(wanted)}" if wanted else ""
    databases = names if len(names) < len(DIALECTS) else ()
    return command + flags + "".join(f" --dialect {name}" for name in databases)


def _revision(
    job_table: JobTable,
    steps: Sequence[Step],
    names: Sequence[str],
    command: str,
    *,
    config: Path | None,
    write: bool,
) -> dict[str, str | None]:
    """Return the revision, its text, and its path if it is written to Alembic's project.

    It is named by a hash of what it does.
    """
    up, down = _body(steps, names), _body([step.undone for step in reversed(steps)], names)
    revision = hashlib.sha256(f"{up}\n{down}".encode()).hexdigest()[:12]
    if write:
        path = _write(config, revision, f"claims of {job_table.table.name}", up, down)
        text = path.read_text(encoding="utf-8")
        return {"revision": revision, "path": str(path), "text": text}
    template = Path(__file__).with_name("revision.txt").read_text(encoding="utf-8")
    title = f"Make {job_table.table.fullname} fit for its claims."
    text = template.format(title=title, revision=revision, command=command, up=up, down=down)
    return {"revision": revision, "path": None, "text": text}


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
        # That client ends a statement at any semicolon, unless DELIMITER says otherwise.
        return f"DELIMITER //\n{statement}//\nDELIMITER ;"
    return f"{statement};"


def _body(steps: Sequence[Step], names: Sequence[str]) -> str:
    """Return the body of a function; databases with the same statements share a branch."""
    depth = 1 if len(names) == 1 else 2
    branches: dict[str, list[str]] = {}
    for name in names:
        lines = (line for step in steps if step.up.get(name) for line in _calls(step, name, depth))
        branches.setdefault("\n".join(lines), []).append(name)
    if depth == 1 or not any(branches):
        return "".join(branches).strip() or "pass"
    body, word = "dialect = op.get_context().dialect.name", "if"
    for branch, same in branches.items():
        if branch:
            said = ", ".join(map(quoted_literal, same))
            test = f"== {said}" if len(same) == 1 else f"in {{{said}}}"
            body += f"\n    {word} dialect {test}:\n{branch}"
            word = "elif"
    return body


def _calls(step: Step, name: str, depth: int) -> Iterator[str]:
    """Yield the lines that execute the statements of a step."""
    indent = "    " * depth
    yield f"{indent}# {step.comment}"
    if name in step.alone:
        yield f"{indent}# CONCURRENTLY stops no writer, and cannot be part of a transaction."
        yield f"{indent}with op.get_context().autocommit_block():"
        indent += "    "
    for statement in step.up[name]:
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


def _write(config: Path | None, revision: str, title: str, up: str, down: str) -> Path:
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
    toml = Path("pyproject.toml")
    if found is None and toml.is_file():
        tools = tomllib.loads(toml.read_text(encoding="utf-8")).get("tool", {})
        found = toml if "alembic" in tools else None
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
        script = folder.generate_revision(revision, title, upgrades=up, downgrades=down)
    except Refusal as error:
        raise CommandError(f"--write: {error}") from None
    assert script is not None
    return Path(script.path)
