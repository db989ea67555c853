"""A stand-in for FileStorage of platformatic's job-queue 0.5: the same calls on the same folders.

Only what touches the queue, the claimed files, the states and the workers, in the package's order.
"""

import math
import os
import re
import shutil
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

FOLDERS = ("queue", "processing", "jobs", "results", "errors", "workers", "notify")


class FileStorage:
    """The storage of one producer or consumer."""

    _temporary = count()

    def __init__(self, base: Path) -> None:
        self.base = base
        for name in FOLDERS:
            (base / name).mkdir(parents=True, exist_ok=True)
        numbers = [self._number(name) for name in os.listdir(base / "queue")]
        self._sequence = int(max((n for n in numbers if not math.isnan(n)), default=0))

    @staticmethod
    def _number(name: str) -> float:
        """JavaScript's ``parseInt`` of what is before the first ``-``."""
        found = re.match(r"\s*\d+", name.split("-", maxsplit=1)[0])
        return int(found[0]) if found else float("nan")

    def _write(self, path: Path, content: bytes) -> None:
        """Write a hidden file in the same folder and rename it, as fast-write-atomic does."""
        temporary = path.with_name(f".{os.getpid()}.{next(self._temporary)}")
        number = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(number, content)
        os.fsync(number)
        os.close(number)
        os.rename(temporary, path)

    def enqueue(self, job: str) -> None:
        """Put a job."""
        self.set_state(job, "queued:1")
        self._put(job, job.encode())

    def _put(self, job: str, message: bytes) -> None:
        self._sequence += 1
        self._write(self.base / "queue" / f"{self._sequence:012d}-{job}.msg", message)

    def dequeue(self, worker: str) -> str | None:
        """Take the first job by a rename; None if there is none."""
        names = [name for name in os.listdir(self.base / "queue") if name.endswith(".msg")]
        if not names:
            return None
        folder = self.base / "processing" / worker
        folder.mkdir(exist_ok=True)
        for name in sorted(names, key=self._number):
            job = name.replace(".msg", "").partition("-")[2]
            try:
                os.rename(self.base / "queue" / name, folder / f"{job}.msg")
                return (folder / f"{job}.msg").read_text(encoding="utf-8")
            except FileNotFoundError:
                continue
        return None

    def set_state(self, job: str, state: str) -> None:
        """Note what has become of a job."""
        self._write(self.base / "jobs" / f"{job}.state", state.encode())

    def state(self, job: str) -> str:
        """Return the state of a job, or an empty string if it was cancelled."""
        try:
            return (self.base / "jobs" / f"{job}.state").read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""

    def ack(self, job: str, worker: str) -> None:
        """Remove a claimed job."""
        (self.base / "processing" / worker / f"{job}.msg").unlink(missing_ok=True)

    def requeue(self, job: str, worker: str) -> None:
        """Put a job back under a new number."""
        self.ack(job, worker)
        self._put(job, job.encode())

    def register(self, worker: str) -> None:
        """Note that a consumer works."""
        self._write(self.base / "workers" / f"{worker}.worker", b"99999999999999")

    def unregister(self, worker: str) -> None:
        """Remove the worker and its whole folder, as ``stop()`` does."""
        (self.base / "workers" / f"{worker}.worker").unlink(missing_ok=True)
        shutil.rmtree(self.base / "processing" / worker, ignore_errors=True)

    def reap(self) -> list[str]:
        """Requeue the jobs whose time is over, as the reaper does when it starts."""
        found = []
        for name in os.listdir(self.base / "workers"):
            worker = name.replace(".worker", "")
            for path in self._processing(worker):
                job = path.read_text(encoding="utf-8")
                if self.state(job).startswith("processing:"):
                    self.requeue(job, worker)
                    self.set_state(job, "failing:1:1")
                    found.append(job)
        return found

    def _processing(self, worker: str) -> Iterator[Path]:
        folder = self.base / "processing" / worker
        for name in os.listdir(folder) if folder.exists() else []:
            if name.endswith(".msg") and (folder / name).is_file():
                yield folder / name

    def consume(self, worker: str, record: Path, *, idle: int = 3) -> None:
        """Consume jobs until several reads have found the queue empty."""
        while idle:
            if (job := self.dequeue(worker)) is None:
                idle -= 1
                time.sleep(0.01)
                continue
            if not self.state(job):
                self.ack(job, worker)
                continue
            self.set_state(job, f"processing:1:{worker}")
            with record.open("ab", buffering=0) as log:
                log.write(f"{job}\n".encode())
            self.set_state(job, "completed:1")
            self.ack(job, worker)
