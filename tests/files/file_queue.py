"""A directory queue for tests, and what is found in it."""

import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from atomic_claim.files import ClaimedFile, claim_files, put_file, recover_files

HEARTBEAT = ".heartbeat"
MEMORY = Path("/dev/shm")  # noqa: S108 - folders in it get unpredictable names


@contextmanager
def in_memory(otherwise: Path) -> Iterator[Path]:
    """Yield a folder on an in-memory file system, or `otherwise` if there is none."""
    if not os.access(MEMORY, os.W_OK):
        yield otherwise
        return
    folder = tempfile.mkdtemp(prefix="atomic_claim-tests-files-", dir=MEMORY)
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder)


@dataclass(frozen=True)
class FileQueue:
    """The folders of a queue; each job's content tells it from all others."""

    base: Path

    @classmethod
    def make(cls, base: Path) -> Self:
        """Make its folders."""
        queue = cls(base)
        for folder in (queue.waiting, queue.processing):
            folder.mkdir(parents=True)
        return queue

    @property
    def waiting(self) -> Path:
        """Where jobs wait."""
        return self.base / "waiting"

    @property
    def processing(self) -> Path:
        """Where claimed jobs are."""
        return self.base / "processing"

    @property
    def done(self) -> Path:
        """Where completed jobs are kept."""
        return self.base / "done"

    @property
    def failed(self) -> Path:
        """Where failed jobs are kept."""
        return self.base / "failed"

    def put(self, *names: str) -> None:
        """Put jobs, each with its own name as content."""
        for name in names:
            put_file(self.waiting, name, name, durable=False)

    def claim(self, limit: int = 1, worker: str = "w1", **options: Any) -> list[ClaimedFile]:
        """Claim jobs."""
        return claim_files(
            limit, waiting=self.waiting, processing=self.processing, worker=worker, **options
        )

    def one(self, worker: str = "w1", **options: Any) -> ClaimedFile:
        """Claim one job, which has to be there."""
        (file,) = self.claim(1, worker, **options)
        return file

    def recover(self, older_than: float = 0, **options: Any) -> list[str]:
        """Recover what workers left, by default of all of them, and give the names."""
        found = recover_files(
            waiting=self.waiting, processing=self.processing, older_than=older_than, **options
        )
        return [path.name for path in found]

    def silence(self, worker: str, seconds: int = 3600) -> None:
        """Have a worker's last sign of life be so long ago."""
        then = time.time() - seconds
        os.utime(self.processing / worker / HEARTBEAT, (then, then))

    def waits(self) -> list[str]:
        """Return the names of the waiting files, without hidden ones."""
        return sorted(p.name for p in self.waiting.iterdir() if not p.name.startswith("."))

    def places(self) -> dict[str, list[str]]:
        """Every job by its content, and where it is, half-written files aside."""
        found: dict[str, list[str]] = {}
        for path in sorted(self.base.rglob("*")):
            parts = path.relative_to(self.base).parts
            hidden = path.name.startswith(".") or ".attempts" in parts
            if path.is_file() and not hidden and path.suffix != ".reason":
                found.setdefault(path.read_text(), []).append("/".join(parts))
        return found

    def drain(self) -> Counter[str]:
        """Claim all that waits, complete it, and count what was in it."""
        ran: Counter[str] = Counter()
        while files := self.claim(10, "last"):
            for file in files:
                ran[file.read_text()] += 1
                file.path.unlink()
        return ran
