"""Small changes to the library; the tests must catch each of them.

    python -m tests.model.planted [NAME ...]

applies each to a copy of the project, runs the fast tests there, and the model test if they do
not catch it, and prints which test did. It exits with 1 if one was not caught, with 2 if an edit
does not apply or the tests fail without one.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

REPOSITORY: Final = Path(__file__).parent.parent.parent
MODEL: Final = ("tests/model/test_model.py",)
FAST: Final = (
    "tests/claim/test_claim.py",
    "tests/ending/test_lease.py",
    "tests/ending/test_lease_order.py",
    "tests/claim/test_tables.py",
    "tests/claim/test_restart.py",
    "tests/claim/test_own_transactions.py",
    "tests/claim/test_one_road.py",
    "tests/traps",
)


@dataclass(frozen=True)
class Planted:
    """A change to the library.

    Attributes:
        name: what is wrong then.
        path: the module, below the package.
        old: the text that is replaced; it stands there once.
        new: what it is replaced with.
        on: the database whose tests have to catch it.
    """

    name: str
    path: str
    old: str
    new: str
    on: str = "sqlite"


BUGS: Final = (
    Planted(
        "token not compared",
        "lifecycle.py",
        "return and_(*owned, predicates.is_running(job_table))",
        "return predicates.is_running(job_table)",
    ),
    Planted(
        "lease not checked",
        "predicates.py",
        "over = Branch((running, lease <= job_table.now(lease)), (lease,))",
        "over = Branch((running, lease.is_not(None)), (lease,))",
    ),
    Planted(
        "order dropped",
        "backends/postgresql.py",
        "ON {same} \\nORDER BY {order}",
        'ON {same}" + f"{order[:0]}',
        "postgresql",
    ),
    Planted(
        "NULL is not due",
        "predicates.py",
        "return or_(column.is_(None), condition) if column.nullable else condition",
        "return condition",
    ),
    Planted(
        "a last attempt is claimed together with other rows",
        "plan.py",
        "shares = request.limit > 1 and not request.deletes",
        "shares = request.limit < 1 and not request.deletes",
    ),
    Planted(
        "limit plus one",
        "plan.py",
        "found: dict[str, Any] = {LIMIT: self.limit,",
        "found: dict[str, Any] = {LIMIT: self.limit + 1,",
    ),
    Planted(
        "guard of the lock removed on MySQL and MariaDB",
        "backends/innodb.py",
        "free = locking_rows(plan, backend).where(*plan.conditions)",
        "free = locking_rows(plan, backend).where(sa.true())",
        "mysql",
    ),
    Planted(
        "rows that cannot be read are committed and forgotten",
        "claim.py",
        "found, failed = salvage(tx, plan, params, error)",
        "raise",
    ),
    Planted(
        "a mark by key without a guard",
        "backends/base.py",
        "return ByKey(plan.job_table.key, marking.where(claimable).where)",
        "return ByKey(plan.job_table.key, marking.where)",
        "mysql",
    ),
    Planted(
        "a claim does not check its own mark",
        "plan.py",
        "(sa.and_(sa.true(), *marks), wrong), else_=sa.literal_column(str(NOT_MARKED))",
        "(sa.true(), sa.literal_column('0')), else_=sa.literal_column(str(NOT_MARKED))",
    ),
    Planted(
        "a session is not pinned to one connection",
        "orm.py",
        "if mapper is not None and _write_bind(original, mapper) is engine:",
        "if mapper is None:",
    ),
    Planted(
        "rows are not marked one by one after a failure",
        "claim.py",
        "        careful=None if request.deletes else False,\n",
        "",
    ),
    Planted(
        "an isolation level of the connection's own is ignored",
        "execution.py",
        "level == dialect.default_isolation_level",
        "level is not None",
        "postgresql",
    ),
    Planted(
        "rows not locked on PostgreSQL",
        "backends/postgresql.py",
        "return lambda branch: branch.with_for_update("
        "skip_locked=True, key_share=not changes_key, of=of)",
        "return lambda branch: branch.where()",
        "postgresql",
    ),
    Planted(
        "a release counts the attempt",
        "outcomes.py",
        "values[attempts] = case((attempts > 0, attempts - 1), else_=0)",
        "values[attempts] = case((attempts > 0, attempts), else_=0)",
    ),
    Planted(
        "due is not asked",
        "predicates.py",
        "return (_null_or(due, is_ripe(job_table)), *is_unspent(job_table))",
        "return is_unspent(job_table)",
    ),
    Planted(
        "one attempt too many",
        "predicates.py",
        "return (_null_or(attempts, attempts < InlineLiteral(most, Integer())),)",
        "return (_null_or(attempts, attempts <= InlineLiteral(most, Integer())),)",
    ),
    Planted(
        "no write lock before the read on SQLite",
        "backends/sqlite.py",
        "        tx.execute(job_table.prepare(_lock))\n        tx.refuse_autocommit(",
        "        tx.refuse_autocommit(",
    ),
    Planted(
        "only the first column of a key",
        "sql_elements.py",
        "sa.and_(*(c == v for c, v in zip(key, values, strict=True))) for values in keys",
        "key[0] == values[0] for values in keys",
    ),
    Planted(
        "an end or an extension is not guarded by the token of its claim",
        "lifecycle.py",
        "guard = job_table.prepare(lasting if runs else owning)",
        "guard = predicates.is_running(job_table)",
    ),
    Planted(
        "an earlier try is not looked for after a lost connection",
        "claim.py",
        "if tx.after_disconnect and (keys := traced(tx, plan, params)):",
        "if tx.after_disconnect and (keys := traced(tx, plan, {})):",
        "postgresql",
    ),
    Planted(
        "the keys are not locked on PostgreSQL",
        "backends/advisory.py",
        "func.pg_try_advisory_xact_lock(table, number)",
        "number.is_not(None)",
        "postgresql",
    ),
    Planted(
        "the lock of the keys ends before the commit on MySQL and MariaDB",
        "backends/named_lock.py",
        "        _acquire(connection, name, table.fullname)\n        yield\n",
        "        _acquire(connection, name, table.fullname)\n"
        "        connection.execute(select(func.release_lock(name)))\n"
        "        yield\n",
        "mysql",
    ),
    Planted(
        "the look counts no running rows",
        "backends/by_key.py",
        "running.where(self._column == key, predicates.is_held(job_table))",
        "running.where(self._column == key, predicates.is_free(job_table))",
    ),
    Planted(
        "a turn always begins at the first key",
        "backends/fair.py",
        "if position is not None and position.key is not None:",
        "if position is not None and self.limit == 0:",
    ),
    Planted(
        "a lost COMMIT is taken for rolled back",
        "execution.py",
        "self.lost, self.unknown = True, self.unknown or self.committing",
        "self.lost, self.unknown = True, False",
        "postgresql",
    ),
)


def copied(folder: Path) -> Path:
    """Copy what the tests need of the project."""
    for name in ("atomic_claim", "examples", "tests"):
        shutil.copytree(
            REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(REPOSITORY / name, folder / name)
    # That it fails is enough: nobody reads the example.
    test = folder / "tests/model/test_model.py"
    test.write_text(test.read_text(encoding="utf-8").replace(", Phase.shrink", ""), "utf-8")
    return folder


def apply(bug: Planted, folder: Path) -> None:
    """Make the change in a copy.

    Raises:
        ValueError: the text to be replaced is not there, or not only once.
    """
    path = folder / "atomic_claim" / bug.path
    source = path.read_text(encoding="utf-8")
    if source.count(bug.old) != 1:
        raise ValueError(f"{bug.name}: {bug.path} has the text {source.count(bug.old)} times")
    path.write_text(source.replace(bug.old, bug.new), encoding="utf-8")


def caught_by(folder: Path, tests: tuple[str, ...], database: str = "") -> tuple[str, str] | None:
    """Run a database's tests in a copy, or all of them.

    Returns:
        The first test that fails and pytest's output, or None.
    """
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "2", "--dist", "worksteal"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-k", database, *tests],
        cwd=folder,
        env=os.environ | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if failed is None:
        raise RuntimeError(f"pytest ended with {done.returncode}: {done.stdout}{done.stderr}")
    return failed[1].removeprefix("tests/"), done.stdout


def main() -> int:
    """Plant each bug, and print the table of bugs and tests."""
    parser = argparse.ArgumentParser(prog="python -m tests.model.planted", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="which bugs, by name")
    wanted = parser.parse_args().names or [bug.name for bug in BUGS]
    if unknown := set(wanted) - {bug.name for bug in BUGS}:
        parser.error(f"no such bug: {', '.join(sorted(unknown))}")
    missed = 0
    with tempfile.TemporaryDirectory() as name:
        if (failed := caught_by(copied(Path(name)), (*MODEL, *FAST))) is not None:
            print(f"{failed[1]}{failed[0]} fails without a bug", file=sys.stderr)  # noqa: T201 - a command
            return 2
    print("| bug | caught by |\n|---|---|")  # noqa: T201 - a command
    for bug in (bug for bug in BUGS if bug.name in wanted):
        with tempfile.TemporaryDirectory() as name:
            folder = copied(Path(name))
            try:
                apply(bug, folder)
            except ValueError as error:
                print(error, file=sys.stderr)  # noqa: T201 - a command
                return 2
            found = caught_by(folder, FAST, bug.on) or caught_by(folder, MODEL, bug.on)
        missed += found is None
        print(f"| {bug.name} | {found[0] if found else '-'} |", flush=True)  # noqa: T201 - a command
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
