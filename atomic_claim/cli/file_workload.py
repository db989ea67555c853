"""The same two loops on a directory queue: a file a job.

Nothing here needs Typer or Rich: worker processes import this module.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from atomic_claim.files import claim_files, complete_files
from atomic_claim.testing.database import CommandError
from atomic_claim.testing.harness import Send, Work, run_workers
from atomic_claim.testing.interrupts import deferred
from atomic_claim.testing.racing import TIMEOUT
from atomic_claim.testing.results import Call, Counted, Key

from .workload import Progress, Workload, do_work

RunJob = Callable[[str, str], None]
"""Runs a job, given by its file's name and content."""
Loop = Callable[[Path, Path, int, RunJob], None]


def legacy_file_loop(waiting: Path, processing: Path, limit: int, run: RunJob) -> None:
    """List the folder, then read each file, write a copy and unlink the source.

    Between the read and the unlink every other worker reads the same file. A source that is gone
    at the unlink is ignored, as by ``rm -f``; where it is not, stray copies are left.
    """
    while names := sorted(path.name for path in waiting.iterdir())[:limit]:
        found = []
        for name in names:
            try:
                subject = (waiting / name).read_text(encoding="utf-8")
            except FileNotFoundError:
                continue
            (processing / name).write_text(subject, encoding="utf-8")
            (waiting / name).unlink(missing_ok=True)
            found.append(name)
            run(name, subject)
        for name in found:
            (processing / name).unlink(missing_ok=True)


def claim_file_loop(waiting: Path, processing: Path, limit: int, run: RunJob) -> None:
    """Claim waiting files until there are none."""
    while files := claim_files(limit, waiting=waiting, processing=processing):
        for file in files:
            run(file.name, file.read_text())
        complete_files(files)


FILE_HALVES: dict[str, Loop] = {"legacy loop": legacy_file_loop, "claim_files": claim_file_loop}


@contextmanager
def _begun(loop: Loop, base: Path, limit: int, worker: int) -> Iterator[Work]:
    """Yield the function that runs a loop, in which every run of a job is recorded."""

    def work(send: Send) -> None:
        def run(name: str, subject: str) -> None:
            begin = time.perf_counter()
            do_work(subject)
            send(Call(worker, begin, time.perf_counter(), ((str(int(name)),),)))

        try:
            loop(base / "waiting", base / "processing", limit, run)
        except OSError as error:
            # What the system refuses ends the work like a refused claim.
            raise CommandError(f"{error.filename}: {error.strerror}") from error

    yield work


def run_file_half(name: str, workload: Workload, progress: Progress) -> Counted:
    """Run one loop in as many processes as there are workers, on a folder of its own.

    Args:
        name: which loop, of ``FILE_HALVES``.
        workload: how much, and by how many.
        progress: told every few milliseconds how many jobs were run.

    Raises:
        CommandError: a worker could not work.
    """
    calls: list[Call] = []
    done: set[Key] = set()

    def receive(_: int, call: Call) -> bool:
        calls.append(call)
        done.update(call.keys)
        progress(len(done))
        return False

    with _filled_folder(workload.jobs) as base:
        start, _ = run_workers(
            partial(_begun, FILE_HALVES[name], base, workload.limit),
            workload.workers,
            seconds=TIMEOUT + workload.jobs,
            receive=receive,
            tick=lambda: False,
        )
    return Counted(
        name=name,
        workers=workload.workers,
        keys=frozenset((str(number),) for number in range(1, workload.jobs + 1)),
        limit=workload.limit,
        calls=[call.since(start) for call in calls],
    )


@contextmanager
def _filled_folder(count: int) -> Iterator[Path]:
    """Yield a folder of jobs, and always remove it afterwards."""
    with deferred():
        folder = TemporaryDirectory(prefix="atomic-claim-")
    try:
        base = Path(folder.name)
        _fill(base, count)
        yield base
    finally:
        with deferred():
            folder.cleanup()


def _fill(base: Path, count: int) -> None:
    for name in ("waiting", "processing"):
        (base / name).mkdir()
    width = len(str(count))
    for number in range(1, count + 1):
        text = f"Mail {number} of {count}"
        (base / "waiting" / f"{number:0{width}d}").write_text(text, encoding="utf-8")
