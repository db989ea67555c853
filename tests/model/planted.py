"""Small changes to the library; the tests must catch each of them.

    python -m tests.model.planted [NAME ...]

applies each to a copy of the project, runs the model test and the fast tests there, and prints
which test caught it. It exits with 1 if one was not caught, with 2 if an edit does not apply or
the tests fail without one.
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
MODEL: Final = ("tests/model",)
FAST: Final = (
    "tests/test_claim.py",
    "tests/test_lease.py",
    "tests/test_lease_order.py",
    "tests/test_tables.py",
    "tests/test_restart.py",
    "tests/test_own_transactions.py",
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
    """

    name: str
    path: str
    old: str
    new: str


BUGS: Final = (
    Planted(
        "token not compared",
        "lease.py",
        "return and_(self.job_table.token == self.token, running)",
        "return running",
    ),
    Planted(
        "lease not checked",
        "columns.py",
        "expired = (self.is_running, lease <= self.now(lease), *unspent)",
        "expired = (self.is_running, lease.is_not(None), *unspent)",
    ),
    Planted(
        "order dropped",
        "dialects/postgresql.py",
        'AS \\n({statement.strip()})\\n SELECT {claimed_name}.* \\n"\n'
        '        f"FROM {claimed_name} JOIN {claimable_name} ON {same} \\nORDER BY {order}"',
        'AS \\n({statement.strip()})\\n SELECT {claimed_name}.* \\n"\n'
        '        f"FROM {claimed_name} JOIN {claimable_name} ON {same}"[: len(order) + 999]',
    ),
    Planted(
        "NULL is not due",
        "columns.py",
        "return or_(column.is_(None), condition) if column.nullable else condition",
        "return condition",
    ),
    Planted(
        "limit plus one",
        "statement.py",
        "found: dict[str, Any] = limits(self.limit)",
        "found: dict[str, Any] = limits(self.limit + 1)",
    ),
    Planted(
        "guard of the lock removed on MySQL and MariaDB",
        "dialects/mysql.py",
        "self.lock = self._by_key(self._locking(skip_locked=True).where(*parts.conditions))",
        "self.lock = self._by_key(self._locking(skip_locked=True).where(true()))",
    ),
    Planted(
        "autocommit where a row may be unreadable",
        "claim.py",
        "single=lambda strategy: strategy.is_single(parts) and not parts.may_be_unreadable,",
        "single=lambda strategy: strategy.is_single(parts),",
    ),
    Planted(
        "rows not locked on PostgreSQL",
        "dialects/postgresql.py",
        "return lambda branch: branch.with_for_update("
        "skip_locked=True, key_share=not changes_key, of=of)",
        "return lambda branch: branch.where()",
    ),
    Planted(
        "a release counts the attempt",
        "lease.py",
        "values[attempts] = case((attempts > 0, attempts - 1), else_=0)",
        "values[attempts] = case((attempts > 0, attempts), else_=0)",
    ),
    Planted(
        "due is not asked",
        "columns.py",
        "conditions.append(_null_or(self.due, self.due <= self.now(self.due)))",
        "conditions.append(true())",
    ),
    Planted(
        "one attempt too many",
        "columns.py",
        "return (_null_or(self.attempts, self.attempts < most),)",
        "return (_null_or(self.attempts, self.attempts <= most),)",
    ),
    Planted(
        "no write lock before the read on SQLite",
        "dialects/sqlite.py",
        "        work.execute(_lock(job_table))\n        refuse",
        "        refuse",
    ),
    Planted(
        "only the first column of a key",
        "statement.py",
        "and_(*(c == v for c, v in zip(key, values, strict=True))) for values in keys",
        "key[0] == values[0] for values in keys",
    ),
    Planted(
        "an extension is not guarded by the token of its claim",
        "lease.py",
        "guard = owned.guard() if ends else owned.lasting()",
        "guard = owned.guard() if ends else owned.job_table.is_running",
    ),
    Planted(
        "an earlier try is not looked for after a lost connection",
        "claim.py",
        "found = _won_before(strategy, work, parts, token) if work.resumed else []",
        "found: Found = []",
    ),
    Planted(
        "the keys are not locked on PostgreSQL",
        "dialects/advisory.py",
        "func.pg_try_advisory_xact_lock(table, number)",
        "number.is_not(None)",
    ),
    Planted(
        "the lock of the keys ends before the commit on MySQL and MariaDB",
        "dialects/named_lock.py",
        "        connection.rollback()\n        yield",
        "        connection.execute(select(func.release_lock(name)))\n"
        "        connection.rollback()\n        yield",
    ),
    Planted(
        "the look counts no running rows",
        "dialects/by_key.py",
        "running.where(self._column == key, job_table.is_held)",
        "running.where(self._column == key, job_table.is_free)",
    ),
    Planted(
        "a failed commit is not rolled back on SQLite",
        "dialects/sqlite.py",
        "if not self.in_transaction(pooled) or not _is_legacy(pooled.driver_connection):",
        "if pooled is not None:",
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


def caught_by(folder: Path, tests: tuple[str, ...]) -> str | None:
    """Run tests in a copy, and return the first that fails."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "2", "--dist", "worksteal"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", *tests],
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
    return failed[1].removeprefix("tests/")


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
            print(f"{failed} fails without a bug", file=sys.stderr)  # noqa: T201 - a command
            return 2
    print("| bug | model test | fast tests |\n|---|---|---|")  # noqa: T201 - a command
    for bug in (bug for bug in BUGS if bug.name in wanted):
        with tempfile.TemporaryDirectory() as name:
            folder = copied(Path(name))
            try:
                apply(bug, folder)
            except ValueError as error:
                print(error, file=sys.stderr)  # noqa: T201 - a command
                return 2
            found = [caught_by(folder, tests) for tests in (MODEL, FAST)]
        missed += found == [None, None]
        cells = [each or "-" for each in found]
        print(f"| {bug.name} | {cells[0]} | {cells[1]} |", flush=True)  # noqa: T201 - a command
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
