"""Directory queues: two at once, each stopped before any of its system calls."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from atomic_claim import ClaimLost
from atomic_claim.files import ClaimedFile, complete_files, fail_files, release_files
from tests.files.file_queue import FileQueue, in_memory
from tests.files.system_calls import Actor, before_each, recorded, stepwise, without_renameat2

pytestmark = pytest.mark.once

ENDS: dict[str, Callable[..., Any]] = {
    "complete": complete_files,
    "release": release_files,
    "fail": fail_files,
}
# In these many calls of the other's; the first's are gone through one by one.
SOME = (1, 2, 3, 5, 8, 13, None)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """Yield an in-memory folder if there is one: the tests make thousands of small queues."""
    with in_memory(tmp_path) as folder:
        yield folder


class Case:
    """A queue with a claimed job ``a`` and a waiting job ``b``, and what can be done to it."""

    def __init__(self, base: Path) -> None:
        self.queue = FileQueue.make(base)
        self.queue.put("a")
        self.file = self.queue.one("w1")
        self.queue.put("b")
        self.claimed: list[ClaimedFile] = []

    def do(self, operation: str, by: str) -> bool:
        """Do it; False if the claim was lost meanwhile."""
        if operation == "claim":
            self.claimed += self.queue.claim(2, by)
        elif operation == "recover":
            self.queue.recover()
        else:
            try:
                ENDS[operation](self.file)
            except ClaimLost:
                return False
        return True

    def count(self, operation: str) -> int:
        """How many system calls it makes alone."""
        with recorded() as calls:
            self.do(operation, "alone")
        return len(calls)


@pytest.mark.parametrize("other", ["claim", "recover"])
@pytest.mark.parametrize("one", ["claim", "complete", "release", "fail", "recover"])
def test_each_job_is_in_one_place(memory: Path, one: str, other: str) -> None:
    """Each job has one owner, wherever one worker stops and however far the other proceeds."""
    last = Case(memory / "alone").count(one)
    for before in range(last):
        for during in SOME:
            case = Case(memory / f"{before}-{during}")
            with stepwise():
                first = Actor(partial(case.do, one, "w2"))
                first.go(before + 1)
                assert not first.ended
                second = Actor(partial(case.do, other, "w3"))
                second.go(during)
                kept = first.finish()
                second.finish()
            _check(case, one, kept, (before, during))


def _check(case: Case, one: str, kept: bool, where: object) -> None:
    queue = case.queue
    gone = one == "complete" and kept
    expected = ["b"] if gone else ["a", "b"]
    places = queue.places()
    assert sorted(places) == expected, where
    owned = [p for paths in places.values() for p in paths]
    assert len(owned) == len(expected) == len({p.rpartition("/")[2] for p in owned}), (where, owned)
    paths = [str(file.path) for file in case.claimed]
    assert len(paths) == len(set(paths)), where
    queue.recover()
    assert all(len(paths) == 1 for paths in queue.places().values()), (where, queue.places())
    ended = {"a"} if one in {"complete", "fail"} and kept else set()
    assert queue.drain() == dict.fromkeys({"a", "b"} - ended, 1), where


def test_two_recoveries_of_many_jobs(memory: Path) -> None:
    """Two recoveries that take turns call by call return each job once between them."""
    for turn in (1, 2, 3, 5, 7):
        queue = FileQueue.make(memory / str(turn))
        queue.put("a", "b", "c", "d")
        queue.claim(3, "w1")
        queue.claim(1, "w2")
        with stepwise():
            both = [Actor(queue.recover), Actor(queue.recover)]
            while not all(actor.ended for actor in both):
                for actor in both:
                    actor.go(turn)
            returned = [actor.finish() for actor in both]
        names = sorted(chain(*returned))
        assert names == ["a", "b", "c", "d"], turn
        assert queue.drain() == dict.fromkeys("abcd", 1)


def of_one_name(folder: Path) -> tuple[FileQueue, list[ClaimedFile]]:
    """Claim two jobs of one name, by the workers "first" and "second"."""
    queue, files = FileQueue.make(folder), []
    for content in ("first", "second"):
        (queue.waiting / "a").write_text(content, encoding="utf-8")
        files.append(queue.one(content))
    return queue, files


def test_two_failures_of_equal_names(memory: Path) -> None:
    """Two jobs of one name that fail at once keep one reason each, each its own."""
    for before in range(60):
        queue, files = of_one_name(memory / str(before))
        with stepwise():
            first = Actor(partial(fail_files, files[0], "first"))
            first.go(before + 1)
            ended = first.ended
            Actor(partial(fail_files, files[1], "second")).finish()
            first.finish()
        jobs = [path for path in queue.failed.iterdir() if path.suffix != ".reason"]
        assert len(jobs) == 2
        for job in jobs:
            reason = job.with_name(f"{job.name}.reason").read_text(encoding="utf-8")
            assert reason == f"{job.read_text(encoding='utf-8')}\n", before
        if ended:
            break
    assert before > 5


def test_two_returns_of_equal_names(memory: Path) -> None:
    """Two jobs of one name that go back at once: one waits, the other is claimed still."""
    for before in range(60):
        queue, _ = of_one_name(memory / str(before))
        with stepwise():
            first = Actor(partial(queue.recover, worker="first"))
            first.go(before + 1)
            ended = first.ended
            Actor(partial(queue.recover, worker="second")).finish()
            first.finish()
        assert queue.waits() == ["a"], before
        assert sorted(queue.places()) == ["first", "second"]
        ran = queue.drain()
        queue.recover()
        assert ran + queue.drain() == {"first": 1, "second": 1}
        if ended:
            break
    assert 10 < before < 59


def test_two_claims_take_turns(memory: Path) -> None:
    """Two workers that take turns call by call share the files between them, in order."""
    for turn in range(1, 12):
        queue = FileQueue.make(memory / str(turn))
        queue.put(*"abcdef")
        with stepwise():
            both = [Actor(partial(queue.claim, 3, worker)) for worker in ("w1", "w2")]
            while not all(actor.ended for actor in both):
                for actor in both:
                    actor.go(turn)
            found = [[file.name for file in actor.finish()] for actor in both]
        assert sorted(found[0] + found[1]) == list("abcdef"), turn
        assert all(names == sorted(names) for names in found)


def test_legacy_loops_that_take_turns_share_jobs(memory: Path) -> None:
    """The twin: the loop that reads, writes and unlinks hands the same files to both."""
    queue = FileQueue.make(memory)
    queue.put(*"abcdef")

    def legacy() -> list[str]:
        ran = []
        for path in sorted(queue.waiting.iterdir()):
            try:
                content = path.read_text(encoding="utf-8")
                (queue.processing / path.name).write_text(content, encoding="utf-8")
                path.unlink(missing_ok=True)
            except FileNotFoundError:
                continue
            ran.append(content)
        return ran

    with stepwise():
        both = [Actor(legacy), Actor(legacy)]
        while not all(actor.ended for actor in both):
            for actor in both:
                actor.go(1)
        ran = list(chain(*(actor.finish() for actor in both)))
    assert len(ran) > len(set(ran))


@pytest.mark.parametrize("absent", [False, True])
def test_a_claim_among_puts(memory: Path, absent: bool) -> None:
    """A claim that goes on between any two calls of a put gets the whole job, or another."""
    calls = 0
    for before in range(60):
        queue = FileQueue.make(memory / str(before))
        content = "x" * 5000
        got: list[str] = []
        count = 0

        def between(_: str, __: tuple[object, ...]) -> None:
            nonlocal count
            if count == before:
                found = queue.claim()
                got.extend(file.read_text() for file in found)
            count += 1

        with without_renameat2(absent=absent), before_each(between):
            (queue.waiting / "other").exists()
            from atomic_claim.files import put_file  # noqa: PLC0415

            put_file(queue.waiting, "a", content)
        assert got in ([], [content]), before
        calls = count
        if count <= before:
            break
    assert calls >= 4
