"""Worker functions for the tests of directory queues, imported before any process is forked."""

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from atomic_claim.files import (
    ClaimedFile,
    claim_files,
    complete_files,
    fail_files,
    put_file,
    release_files,
)
from tests.files.file_queue import FileQueue
from tests.files.platformatic import FileStorage
from tests.files.system_calls import before_each, without_renameat2

OPERATIONS: dict[str, Callable[[FileQueue, ClaimedFile], Any]] = {
    "put": lambda queue, _: put_file(queue.waiting, "new", "new"),
    "claim": lambda queue, _: queue.claim(2, "w2"),
    "complete": lambda _, file: complete_files(file),
    "keep": lambda queue, file: complete_files(file, done=queue.done),
    "release": lambda _, file: release_files(file),
    "fail": lambda _, file: fail_files(file, "no"),
    "retry": lambda _, file: fail_files(file, retry=True),
    "recover": lambda queue, _: queue.recover(),
}


def staged(base: Path) -> tuple[FileQueue, ClaimedFile]:
    """Create a queue: ``a`` is claimed for the second time, ``b`` waits after one attempt."""
    queue = FileQueue.make(base)
    queue.put("a", "b")
    queue.claim(2, "dead")
    queue.recover()
    return queue, queue.one("w1")


def die(base: Path, operation: str, file: ClaimedFile, place: int, link: bool) -> None:
    """Do it, and be killed before the call at this place; end well if there are fewer."""
    count = 0

    def before(_: str, __: tuple[Any, ...]) -> None:
        nonlocal count
        if count == place:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    with without_renameat2(absent=link), before_each(before):
        OPERATIONS[operation](FileQueue(base), file)


def work(record: Path, content: bytes) -> None:
    """Run a job: it takes some time, and then notes that it was run."""
    hashlib.pbkdf2_hmac("sha256", content, b"", 200)
    with record.open("ab", buffering=0) as log:
        log.write(content + b"\n")


def drain(base: Path, record: Path, limit: int) -> None:
    """Claim, work and complete until nothing waits."""
    queue = FileQueue(base)
    while files := claim_files(limit, waiting=queue.waiting, processing=queue.processing):
        for file in files:
            work(record, file.read_bytes())
        complete_files(files)


def legacy_drain(base: Path, record: Path, limit: int) -> None:
    """Drain a queue by read, copy and unlink, as directory queues are often written."""
    queue = FileQueue(base)
    while names := sorted(os.listdir(queue.waiting))[:limit]:
        for name in names:
            try:
                content = (queue.waiting / name).read_bytes()
            except FileNotFoundError:
                continue
            copy = queue.processing / name
            copy.write_bytes(content)
            (queue.waiting / name).unlink(missing_ok=True)
            work(record, content)
            copy.unlink(missing_ok=True)


def strict_legacy_drain(base: Path, record: Path, limit: int) -> None:
    """Drain by read, copy and unlink, but skip a job whose source is gone at the unlink."""
    queue = FileQueue(base)
    while names := sorted(os.listdir(queue.waiting))[:limit]:
        for name in names:
            try:
                content = (queue.waiting / name).read_bytes()
                (queue.processing / name).write_bytes(content)
                (queue.waiting / name).unlink()
            except FileNotFoundError:
                continue
            work(record, content)
            (queue.processing / name).unlink(missing_ok=True)


def platformatic_drain(base: Path, worker: str, record: Path, idle: int = 3) -> None:
    """Drain a queue of platformatic's, as a consumer of theirs or as one of ours."""
    if worker.startswith("node"):
        FileStorage(base).consume(worker, record)
        return
    while idle:
        files = claim_files(
            waiting=base / "queue",
            processing=base / "processing",
            worker=worker,
            layout="platformatic",
        )
        for file in files:
            text = file.read_text()
            job = json.loads(text)["id"] if text.startswith("{") else text
            with record.open("ab", buffering=0) as log:
                log.write(f"{job}\n".encode())
        complete_files(files)
        if not files:
            idle -= 1
            time.sleep(0.01)
