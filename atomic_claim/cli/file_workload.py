"""The same two loops on a directory queue: a file a job.

Nothing here needs Typer or Rich: worker processes import this module.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from atomic_claim.errors import ClaimError
from atomic_claim.files import claim_files, complete_files
from atomic_claim.testing.database import CommandError, one_line
from atomic_claim.testing.interrupts import deferred

from .workload import Duty, Half, RunJob, Workload, race


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


@dataclass(frozen=True)
class FileDuty(Duty):
    """Jobs in a folder, done by one of the loops."""

    loop: Loop
    base: Path

    @contextmanager
    def begun(self) -> Iterator[Callable[[RunJob], None]]:
        """Nothing has to be ready; what the system refuses ends the work like a refused claim."""

        def work(run: RunJob) -> None:
            try:
                self.loop(self.base / "waiting", self.base / "processing", self.limit, run)
            except OSError as error:
                raise ClaimError(f"{error.filename}: {error.strerror}") from error

        yield work

    def complaint(self, what: str, error: BaseException) -> CommandError:
        """There are no secrets here."""
        return CommandError(f"{what}: {one_line(error)}")


def run_file_half(workload: Workload, name: str, progress: Callable[[int], None]) -> Half:
    """Run one loop in as many processes as there are workers, on a folder of its own.

    Args:
        workload: how much, and by how many.
        name: which loop, of ``FILE_HALVES``.
        progress: told again and again how far down the queue the workers are, in jobs.

    Raises:
        CommandError: the folder could not be made, or a worker could not work.
    """
    with _filled_folder(workload.jobs) as base:
        runs = race(FileDuty(workload.limit, FILE_HALVES[name], base), workload, progress)
    return Half(name, workload, runs)


@contextmanager
def _filled_folder(count: int) -> Iterator[Path]:
    """Yield a folder of jobs, and always remove it afterwards."""
    base: Path | None = None
    try:
        with deferred():
            base = Path(tempfile.mkdtemp(prefix="atomic-claim-"))
        for name in ("waiting", "processing"):
            (base / name).mkdir()
        width = len(str(count))
        for number in range(1, count + 1):
            text = f"Mail {number} of {count}"
            (base / "waiting" / f"{number:0{width}d}").write_text(text, encoding="utf-8")
        yield base
    except OSError as error:
        raise CommandError(f"cannot fill a folder of jobs: {error}") from None
    finally:
        if base is not None:
            with deferred():
                _remove(base)


def _remove(base: Path) -> None:
    before = sys.exception()
    try:
        shutil.rmtree(base)
    except OSError as error:
        said = f"cannot remove {base} (remove it yourself): {error}"
        raise CommandError(f"{before}; then: {said}" if before else said) from None
