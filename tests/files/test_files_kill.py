"""Directory queues: a SIGKILL at every system call of every operation loses and doubles nothing."""

import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from atomic_claim import ClaimLost
from atomic_claim.files import ClaimedFile, complete_files
from tests.files.file_queue import FileQueue, in_memory
from tests.files.file_worker import (
    OPERATIONS,
    die,
    drain,
    legacy_drain,
    staged,
    strict_legacy_drain,
)
from tests.files.system_calls import (
    every_kill,
    killed_before,
    without_renameat2,
)

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL on Windows"),
]

JOBS, WORKERS = 4_000, 8
LEGACY_JOBS = 2_000
# The loop shows itself at its first step already, so once would do almost always.
ATTEMPTS = 3

if os.name != "nt":
    # A new process is there at once, and has nothing of the tests' own threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.files.file_worker"])


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """Yield an in-memory folder if there is one: the tests make hundreds of small queues."""
    with in_memory(tmp_path) as folder:
        yield folder


# All operations; and those that work where no rename is known not to overwrite.
CASES = [(operation, False) for operation in OPERATIONS] + [
    (operation, True) for operation in ("put", "claim", "complete", "keep", "fail")
]


def check(queue: FileQueue, file: ClaimedFile, operation: str, where: object) -> str:
    """After a kill and a recovery each job is in exactly one place, and is handed out once.

    Returns:
        What has become of job ``a``.
    """
    queue.recover()
    places = queue.places()
    assert all(len(paths) == 1 for paths in places.values()), (where, places)
    assert set(places) - {"new"} >= ({"b"} if operation == "complete" else {"a", "b"}), where
    with pytest.raises(ClaimLost):
        # Whatever had been done: who comes back now has nothing to end any more.
        complete_files(file)
    attempts: dict[str, int] = {}
    while files := queue.claim(9, "next"):
        attempts |= {each.name: each.attempt for each in files}
    assert set(attempts) == {
        name for name, (path,) in places.items() if path.startswith("waiting/")
    }, where
    # `a` was claimed twice; whether the second time counts is the operation's to say.
    assert attempts.get("a", 3) in ({2, 3} if operation == "release" else {3}), (where, attempts)
    queue.recover()
    assert queue.drain() == dict.fromkeys(attempts, 1), where
    for path in queue.failed.glob("[ab]"):
        # A failed job is never there without its reason.
        assert path.with_name(f"{path.name}.reason").read_text(encoding="utf-8") == "no\n", where
    queue.recover()
    assert queue.drain() == {}, where
    return places["a"][0].partition("/")[0] if "a" in places else "gone"


@pytest.mark.parametrize(("operation", "absent"), CASES)
def test_a_kill_at_every_call(memory: Path, operation: str, absent: bool) -> None:
    """Processes that really are killed before each call leave every job in one place."""
    ends = []
    for place in range(100):
        queue, file = staged(memory / str(place))
        arguments = (queue.base, operation, file, place, absent)
        process = context.Process(target=die, args=arguments)
        process.start()
        process.join(60)
        code = process.exitcode
        process.close()
        assert code in {0, -signal.SIGKILL}
        ends.append(check(queue, file, operation, (operation, absent, place)))
        if code == 0:
            break
    assert place > 1
    # It is done by one call, before which nothing has happened and after which all has.
    after = {"complete": "gone", "keep": "done", "fail": "failed"}.get(operation, "waiting")
    assert ends == sorted(ends, key=lambda end: end == after and end != "waiting")
    assert (ends[0], ends[-1]) == ("waiting", after)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_recovery_killed_after_a_kill(memory: Path, operation: str) -> None:
    """A recovery of what a killed process left may be killed at every call of its own, too."""
    place = 0
    while True:
        for second in range(200):
            queue, file = staged(memory / f"{place}-{second}")
            first = killed_before(place, partial(OPERATIONS[operation], queue, file))
            again = killed_before(second, queue.recover)
            check(queue, file, operation, (operation, place, second))
            if not again:
                break
        assert second > 2
        if not first:
            break
        place += 1
    assert place > 1


def test_link_and_unlink_from_the_claimed_path_are_not_enough(memory: Path) -> None:
    """The twin: a job that is linked back while its claimed path stays can be had twice."""
    queue = FileQueue.make(memory / "queue")
    queue.put("a")
    file = queue.one("w1")
    os.link(file.path, queue.waiting / "a")  # and killed before the unlink
    successor = queue.one("w2")
    assert file.read_bytes() == successor.read_bytes()
    assert complete_files(file) == complete_files(successor) == 1


def test_a_copy_and_an_unlink_leave_two(memory: Path) -> None:
    """The twin: a kill in the legacy loop leaves a job waiting and a stray copy of it."""
    strays = 0

    def legacy() -> None:
        content = (queue.waiting / "a").read_bytes()
        number = os.open(queue.processing / "a", os.O_CREAT | os.O_WRONLY)
        os.write(number, content)
        os.close(number)
        os.unlink(queue.waiting / "a")

    queue = FileQueue.make(memory / "first")
    queue.put("a")
    for place in every_kill(legacy):
        strays += sum(len(paths) > 1 for paths in queue.places().values())
        queue = FileQueue.make(memory / str(place))
        queue.put("a")
    assert strays


@pytest.mark.parametrize("absent", [False, True])
def test_a_put_killed_anywhere_waits_whole_or_not_at_all(memory: Path, absent: bool) -> None:
    """A file left by a killed writer is hidden, and its name is free for another try."""
    content = "x" * 200
    for place in range(50):
        queue = FileQueue.make(memory / str(place))
        with without_renameat2(absent=absent):
            killed = killed_before(place, lambda: queue.put(content))
        waits = [path.read_text() for path in queue.waiting.iterdir() if path.name[0] != "."]
        assert waits in ([], [content]), (absent, place)
        if not waits:
            queue.put(content)
        assert queue.drain() == {content: 1}
        if not killed:
            break
    assert place > 2


def run(
    target: Callable[..., None], base: Path, jobs: int, workers: int
) -> tuple[Counter[str], FileQueue]:
    """Drain a queue by several processes; return what their work recorded, and what is left."""
    queue = FileQueue.make(base)
    for number in range(jobs):
        (queue.waiting / f"{number:06d}").write_text(f"{number:06d}", encoding="utf-8")
    team: list[ForkServerProcess] = []
    try:
        for worker in range(workers):
            arguments: tuple[Any, ...] = (base, base / f"record-{worker}", 5)
            process = context.Process(target=target, args=arguments)
            process.start()
            team.append(process)
        for process in team:
            process.join(120)
        codes = [process.exitcode for process in team]
    finally:
        for process in team:
            process.kill()
            process.join()
            process.close()
    assert codes == [0] * workers
    records = sorted(base.glob("record-*"))
    lines = [path.read_text(encoding="utf-8").split() for path in records]
    for path in records:
        path.unlink()
    assert len([each for each in lines if each]) > 1
    return Counter(line for each in lines for line in each), queue


def test_eight_processes_run_each_job_once(memory: Path) -> None:
    """The work itself records 4,000 jobs, each once; the loop before it has some run again."""
    claimed, queue = run(drain, memory / "claimed", JOBS, WORKERS)
    assert claimed == Counter(f"{number:06d}" for number in range(JOBS))
    assert queue.places() == {}
    for attempt in range(ATTEMPTS):
        ran, _ = run(legacy_drain, memory / f"legacy-{attempt}", LEGACY_JOBS, WORKERS)
        _, strict = run(strict_legacy_drain, memory / f"strict-{attempt}", LEGACY_JOBS, WORKERS)
        if any(times > 1 for times in ran.values()) and strict.places():
            break
    else:
        pytest.fail(f"the legacy loops had no duplicates or no strays in {ATTEMPTS} runs")
