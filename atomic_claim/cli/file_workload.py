"""The same two loops on a directory queue: a file a job.

Nothing here needs Typer or Rich: worker processes import this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from atomic_claim.files import claim_files, complete_files
from atomic_claim.testing.database import CommandError
from atomic_claim.testing.interrupts import deferred
from atomic_claim.testing.results import Counted

from .workload import LoopTask, Progress, RunJob, Workload, run_loop


class FileJob(NamedTuple):
    """A job as its file has it.

    Attributes:
        id: the number in the file's name.
        subject: the file's content.
    """

    id: int
    subject: str


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
            run(FileJob(int(name), subject))
        for name in found:
            (processing / name).unlink(missing_ok=True)


def claim_file_loop(waiting: Path, processing: Path, limit: int, run: RunJob) -> None:
    """Claim waiting files until there are none."""
    while files := claim_files(limit, waiting=waiting, processing=processing):
        for file in files:
            run(FileJob(int(file.name), file.read_text()))
        complete_files(files)


FILE_HALVES: dict[str, Loop] = {"legacy loop": legacy_file_loop, "claim_files": claim_file_loop}


def run_file_half(name: str, workload: Workload, progress: Progress) -> Counted:
    """Run one loop in as many processes as there are workers, on a folder of its own.

    Args:
        name: which loop, of ``FILE_HALVES``.
        workload: how much, and by how many.
        progress: told every few milliseconds how many jobs were run.

    Raises:
        CommandError: the folder could not be made, or a worker could not work.
    """
    with _filled_folder(workload.jobs) as base:
        task = LoopTask(FILE_HALVES[name], partial(_folders, base), workload.limit)
        keys = frozenset((str(number),) for number in range(1, workload.jobs + 1))
        return run_loop(name, task, workload, keys, progress=progress)


@contextmanager
def _folders(base: Path) -> Iterator[tuple[Path, Path]]:
    """Yield what a loop is given; what the system refuses ends the work like a refused claim."""
    try:
        yield base / "waiting", base / "processing"
    except OSError as error:
        raise CommandError(f"{error.filename}: {error.strerror}") from error


@contextmanager
def _filled_folder(count: int) -> Iterator[Path]:
    """Yield a folder of jobs, and always remove it afterwards."""
    try:
        with deferred():
            folder = TemporaryDirectory(prefix="atomic-claim-")
        try:
            base = Path(folder.name)
            _fill(base, count)
            yield base
        finally:
            with deferred():
                folder.cleanup()
    except OSError as error:
        raise CommandError(f"cannot fill or remove a folder of jobs: {error}") from None


def _fill(base: Path, count: int) -> None:
    for name in ("waiting", "processing"):
        (base / name).mkdir()
    width = len(str(count))
    for number in range(1, count + 1):
        text = f"Mail {number} of {count}"
        (base / "waiting" / f"{number:0{width}d}").write_text(text, encoding="utf-8")
