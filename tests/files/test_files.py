"""Directory queues: who gets a file, in what order, and what becomes of it."""

import errno
import os
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from atomic_claim import ClaimError, ClaimLost
from atomic_claim.files import (
    ClaimedFile,
    attempts,
    claim_files,
    complete_files,
    fail_files,
    listing,
    put_file,
    recover_files,
    recovery,
    release_files,
    touch_worker,
)
from tests.files.file_queue import HEARTBEAT, FileQueue, in_memory
from tests.files.system_calls import (
    CHANGING,
    before_each,
    recorded,
    without_renameat2,
)

pytestmark = pytest.mark.once

LONGEST = "x" * 251 + ".job"
AWKWARD = ["two\nlines", "sp ace", "-dash", "uml\N{LATIN SMALL LETTER A WITH DIAERESIS}ut", LONGEST]


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[FileQueue]:
    """Yield an empty queue."""
    with in_memory(tmp_path) as folder:
        yield FileQueue.make(folder / "queue")


@pytest.fixture(params=[False, True], ids=["renameat2", "link"])
def either(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Provide a file system that renames without overwriting, then one that cannot."""
    with without_renameat2(absent=request.param):
        yield request.param


# --- the claim


def test_files_are_claimed_in_order(queue: FileQueue) -> None:
    """Files come in the order of their names, never more than the limit, and can be read."""
    queue.put("b", "a", "c")
    first = queue.claim(2)
    assert [file.name for file in first] == ["a", "b"]
    assert [file.read_text() for file in first] == ["a", "b"]
    assert [file.attempt for file in first] == [1, 1]
    assert [file.name for file in queue.claim(2)] == ["c"]
    assert queue.claim() == []


def test_the_path_holds_worker_attempt_and_name(queue: FileQueue) -> None:
    """A claimed path says whose it is, and the claim can be had back from it alone."""
    queue.put("a")
    file = queue.one("w7")
    worker, claim, name = file.path.relative_to(queue.processing).parts
    assert (worker, claim.partition("-")[0], name) == ("w7", "1", "a")
    assert ClaimedFile.at(file.path, queue.waiting) == file
    assert file.processing == queue.processing
    with open(file, "rb") as opened:
        assert opened.read() == file.read_bytes() == b"a"


def test_a_key_orders_in_place_of_the_name(queue: FileQueue) -> None:
    """A key is given each name; equal keys are ordered by name."""
    queue.put("b-2", "a-10", "c-1", "a-2")
    files = queue.claim(4, key=lambda name: int(name.partition("-")[2]))
    assert [file.name for file in files] == ["c-1", "a-2", "b-2", "a-10"]


def test_a_key_may_look_at_the_file(queue: FileQueue) -> None:
    """A key that finds its file gone leaves the name out."""
    queue.put("a", "b", "c")
    os.utime(queue.waiting / "c", (1, 1))

    def age(name: str) -> float:
        if name == "a":
            (queue.waiting / "a").unlink()
        return (queue.waiting / name).stat().st_mtime

    assert [file.name for file in queue.claim(3, key=age)] == ["c", "b"]


def test_a_pattern_chooses(queue: FileQueue) -> None:
    """Only names that match are claimed, and hidden ones never, whatever the pattern."""
    queue.put("a.job", "a.txt", "b.job")
    (queue.waiting / ".hidden.job").write_text("half", encoding="utf-8")
    assert [file.name for file in queue.claim(9, pattern="*.job")] == ["a.job", "b.job"]
    assert queue.claim(9, pattern=".*") == []


def test_awkward_names_are_claimed_as_others(queue: FileQueue) -> None:
    """Line ends, blanks and names of 255 bytes go through the whole of a job's life."""
    assert len(LONGEST) == 255
    queue.put(*AWKWARD)
    files = queue.claim(9)
    assert sorted(file.read_text() for file in files) == sorted(AWKWARD)
    release_files(files)
    assert queue.claim(9) != []
    assert sorted(queue.recover()) == sorted(AWKWARD)
    files = [queue.one() for _ in AWKWARD]
    assert [file.attempt for file in files] == [2] * len(AWKWARD)
    fail_files(files, "no")
    assert sorted(queue.places()) == sorted(AWKWARD)
    assert {path.name for path in queue.failed.iterdir()} >= set(AWKWARD)
    assert len(list(queue.failed.glob("*.reason"))) == len(AWKWARD)
    (queue.failed / LONGEST).rename(queue.waiting / LONGEST)
    fail_files(queue.one(), "again")
    assert len(list(queue.failed.iterdir())) == 2 * len(AWKWARD) + 1


def test_a_longer_name_would_not_do(queue: FileQueue) -> None:
    """The twin: with the attempt and the id in the file's own name the longest cannot be moved."""
    queue.put(LONGEST)
    with pytest.raises(OSError, match="name too long") as raised:
        os.rename(queue.waiting / LONGEST, queue.processing / f"1-{'0' * 32}-{LONGEST}")
    assert raised.value.errno == errno.ENAMETOOLONG


def test_names_that_are_no_text(queue: FileQueue) -> None:
    """A name that is not UTF-8 is claimed, and named in messages."""
    if not isinstance(os.fsdecode(b"\xff"), str) or os.name == "nt":
        pytest.skip("names are text on this system")
    name = os.fsdecode(b"\xff.job")
    (queue.waiting / name).write_bytes(b"odd")
    file = queue.one()
    complete_files(file)
    with pytest.raises(ClaimLost) as raised:
        complete_files(file)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_below_one(queue: FileQueue, limit: int) -> None:
    """A limit below one is refused by name."""
    with pytest.raises(ValueError, match=f"limit is {limit}; expected an int of at least 1"):
        queue.claim(limit)


@pytest.mark.parametrize("limit", [True, 1.0, "1", None])
def test_limit_of_another_type(queue: FileQueue, limit: object) -> None:
    """A limit that is no int is refused by name."""
    with pytest.raises(TypeError, match="expected an int of at least 1"):
        queue.claim(limit)  # type: ignore[arg-type]


def test_an_idle_claim_changes_nothing_but_the_heartbeat(queue: FileQueue) -> None:
    """A worker that polls an empty queue leaves no folders behind."""
    queue.claim()
    with recorded() as calls:
        assert queue.claim() == []
    changed = [name for name, _ in calls if name in CHANGING]
    assert changed == ["mkdir", "open", "utime"]
    assert sorted(p.name for p in queue.processing.rglob("*")) == [HEARTBEAT, "w1"]


# --- two at once


def test_read_write_unlink_gives_a_job_to_both(queue: FileQueue) -> None:
    """The twin: the loop that copies and unlinks lets two workers have the same file."""
    queue.put("a")

    def take(worker: str) -> Iterator[str]:
        content = (queue.waiting / "a").read_text(encoding="utf-8")
        yield "read"
        (queue.processing / f"{worker}-a").write_text(content, encoding="utf-8")
        (queue.waiting / "a").unlink(missing_ok=True)
        yield content

    one, other = take("w1"), take("w2")
    assert [next(one), next(other)] == ["read", "read"]
    assert [next(one), next(other)] == ["a", "a"]


# --- the end of a claim


def test_completed_files_are_gone(queue: FileQueue) -> None:
    """Completion removes the file and the claim's folder, and says how many there were."""
    queue.put("a", "b", "c")
    files = queue.claim(3)
    assert complete_files(files[:2]) == 2
    assert complete_files(files[2]) == 1
    assert queue.places() == {}
    assert [p.name for p in (queue.processing / "w1").iterdir()] == [HEARTBEAT]


@pytest.mark.parametrize("end", ["done", "failed"])
def test_ended_files_keep_their_names(queue: FileQueue, either: bool, end: str) -> None:
    """An ended job keeps its flat name; a second one of that name gets its claim's id behind it."""
    names = []
    for _ in range(2):
        queue.put("a.json")
        file = queue.one()
        names.append(f"a.json.{file.path.parent.name}")
        if end == "done":
            complete_files(file, done=queue.done)
        else:
            fail_files(file, "no")
    # Only a rename that never overwrites can give the first its own name.
    expected = names if either else ["a.json", names[1]]
    if end == "failed":
        expected += [f"{name}.reason" for name in expected]
    assert sorted(p.name for p in (queue.base / end).iterdir()) == sorted(expected)


@pytest.mark.parametrize("odd", ["a", "a.reason"])
def test_what_is_there_already_stays(queue: FileQueue, odd: str) -> None:
    """A failed job takes neither the name nor the reason of another."""
    queue.failed.mkdir()
    (queue.failed / odd).write_text("another", encoding="utf-8")
    queue.put("a")
    file = queue.one()
    fail_files(file, "no")
    claim = file.path.parent.name
    found = {path.name: path.read_text() for path in queue.failed.iterdir()}
    assert found == {odd: "another", f"a.{claim}": "a", f"a.{claim}.reason": "no\n"}


@pytest.mark.parametrize("folder", ["waiting", "processing"])
def test_jobs_do_not_end_where_they_wait(queue: FileQueue, folder: str) -> None:
    """A folder of the queue itself is refused as the folder of its ended jobs."""
    queue.put("a")
    file = queue.one()
    with pytest.raises(ClaimError, match="jobs wait or are claimed there"):
        complete_files(file, done=queue.base / folder)
    assert file.read_text() == "a"


def test_released_files_keep_name_place_and_attempt(queue: FileQueue) -> None:
    """A file that is given back is the first again, as if it had not been claimed."""
    queue.put("a", "b")
    file = queue.one()
    assert release_files(file) == 1
    assert queue.waits() == ["a", "b"]
    again = queue.one()
    assert (again.name, again.attempt) == ("a", 1)
    assert again.path != file.path


def test_attempts_survive(queue: FileQueue) -> None:
    """Recovered and retried attempts count, released ones do not, and the name stays."""
    queue.put("a")
    seen = []
    for end in ("recover", "release", "retry", "release", "recover", "claim"):
        file = queue.one()
        seen.append(file.attempt)
        assert file.path.parent.name.startswith(f"{file.attempt}-")
        if end == "recover":
            assert queue.recover() == ["a"]
        elif end == "release":
            release_files(file)
        elif end == "retry":
            fail_files(file, retry=True)
    assert seen == [1, 2, 2, 3, 3, 4]


def test_attempts_are_the_files_own(queue: FileQueue) -> None:
    """A new job of the same name begins with its first attempt."""
    queue.put("a")
    queue.claim()
    queue.recover()
    second = queue.one()
    assert second.attempt == 2
    queue.put("a")
    first = queue.one()
    assert first.attempt == 1
    complete_files([first, second])
    assert list((queue.processing / attempts.FOLDER).iterdir()) == []


def test_an_attempt_is_counted_that_was_spent_in_between(queue: FileQueue) -> None:
    """A worker that read the number, slept, and then won the file gets the number as it is now."""
    queue.put("a")

    def before(name: str, _: tuple[object, ...]) -> None:
        if name == "rename" and not slept:
            slept.append(name)
            queue.one("quick")
            assert queue.recover(worker="quick") == ["a"]

    slept: list[str] = []
    with before_each(before):
        file = queue.one("slow")
    assert file.attempt == 2
    assert file.path.parent.name.startswith("2-")
    assert file.read_text() == "a"


def test_failed_files_are_put_aside_with_their_reason(queue: FileQueue) -> None:
    """A failed job is kept under its own name, and its own reason beside it."""
    queue.put("a", "b", "c", "d")
    a, b, c, d = queue.claim(4)
    assert fail_files(a, ValueError("no \udcff number")) == 1
    assert fail_files(b, KeyError()) == 1
    assert fail_files([c, d], "both") == 2
    reasons = {path.name: path.read_text() for path in queue.failed.glob("*.reason")}
    assert reasons == {
        "a.reason": "no \\udcff number\n",
        "b.reason": "KeyError\n",
        "c.reason": "both\n",
        "d.reason": "both\n",
    }
    assert {p.name for p in queue.failed.iterdir()} == set("abcd") | set(reasons)
    assert queue.recover() == []


def test_failed_files_without_a_reason(queue: FileQueue) -> None:
    """Without a reason there is only the job, in the folder that is named."""
    queue.put("b")
    assert fail_files(queue.one(), failed=queue.base / "elsewhere") == 1
    assert [p.name for p in queue.base.joinpath("elsewhere").iterdir()] == ["b"]


@pytest.mark.parametrize("rewrite", ["in place", "by a rename", "while it waits"])
def test_a_rewritten_file_keeps_its_attempts(queue: FileQueue, rewrite: str) -> None:
    """The number of attempts stays with the name, however a job writes its file again."""
    queue.put("a")
    for attempt in (1, 2, 3):
        file = queue.one()
        assert file.attempt == attempt
        if rewrite == "in place":
            file.path.write_text(f"step {attempt}", encoding="utf-8")
        elif rewrite == "by a rename":
            scratch = file.path.with_name("scratch")
            scratch.write_text(f"step {attempt}", encoding="utf-8")
            scratch.rename(file.path)
        assert queue.recover() == ["a"]
        if rewrite == "while it waits":
            (queue.waiting / "a").write_text(f"step {attempt}", encoding="utf-8")
    assert queue.one().read_text() == "step 3"


def test_the_records_of_ended_jobs_are_gone(queue: FileQueue) -> None:
    """A claim takes the record of the attempts with it: nothing is left when jobs have ended."""
    queue.put("a")
    for _ in range(3):
        queue.claim()
        queue.recover()
    file = queue.one()
    file.path.write_text("rewritten", encoding="utf-8")
    complete_files(file)
    assert list((queue.processing / attempts.FOLDER).iterdir()) == []


@pytest.mark.parametrize("scratch", ["a.tmp", "b", "scratch"])
def test_scratch_files_are_no_jobs(queue: FileQueue, scratch: str) -> None:
    """A file that a job has half-written beside its own is not recovered, and cannot be ended."""
    queue.put("a")
    path = queue.one().path.with_name(scratch)
    path.write_text("half", encoding="utf-8")
    with pytest.raises(ClaimError, match="is not the path of a claimed file"):
        ClaimedFile.at(path, queue.waiting)
    assert queue.recover() == ["a"]
    assert queue.recover() == []
    assert queue.waits() == ["a"]
    (kept,) = (queue.processing / recovery.TAKEN).glob(f"*/{scratch}")
    assert kept.read_text(encoding="utf-8") == "half"


def test_a_late_worker_cannot_bring_its_job_back(queue: FileQueue) -> None:
    """A worker that replaces its file after a recovery finds no folder to do it in."""
    queue.put("a")
    file = queue.one("late")
    scratch = file.path.with_name("scratch")
    scratch.write_text("late", encoding="utf-8")
    assert queue.recover() == ["a"]
    with pytest.raises(FileNotFoundError):
        scratch.replace(file.path)
    assert queue.recover() == []
    assert queue.drain() == {"a": 1}


def test_a_job_whose_worker_died_is_claimed_alone(queue: FileQueue) -> None:
    """A job that kills its worker costs no other job an attempt."""
    queue.put("a", "b", "c", "d")
    queue.claim(1, "dead")
    queue.one("w2")
    queue.recover(worker="dead")
    assert [file.name for file in queue.claim(9)] == ["a"]
    queue.put("a")
    release_files(queue.one())
    queue.silence("w2")
    queue.recover(worker="w2")
    # The listing goes on where a claim ended ahead of such a job.
    assert [[file.name for file in queue.claim(9)] for _ in range(3)] == [["a"], ["b"], ["c", "d"]]


def test_retried_jobs_are_claimed_together(queue: FileQueue) -> None:
    """Jobs that were returned by their worker are claimed as others are."""
    queue.put("a", "b")
    fail_files(queue.claim(2), retry=True)
    assert [(file.name, file.attempt) for file in queue.claim(9)] == [("a", 2), ("b", 2)]


def test_the_last_attempt(queue: FileQueue) -> None:
    """After the last attempt a job is failed, with a reason, by a retry and by a recovery."""
    queue.put("a", "b")
    for attempt in (1, 2):
        file = queue.one("w1", pattern="a")
        assert file.attempt == attempt
        fail_files(file, "no", retry=True, max_attempts=2)
        queue.one("w1", pattern="b")
        expected = ["b"] if attempt == 1 else []
        assert queue.recover(max_attempts=2) == expected
    reasons = {path.name: path.read_text() for path in queue.failed.glob("*.reason")}
    assert reasons == {
        "a.reason": "no\n",
        "b.reason": "its worker died in attempt 2 of 2\n",
    }
    assert sorted(queue.places()) == ["a", "b"]
    assert queue.waits() == []


@pytest.mark.parametrize("end", [complete_files, release_files, fail_files])
def test_a_late_worker_is_refused(queue: FileQueue, end: object) -> None:
    """After a recovery the old claim ends nothing, while the new one still owns the file."""
    queue.put("a", "b")
    late = queue.claim(2, "late")
    queue.recover()
    successor = queue.one("new")
    with pytest.raises(ClaimLost, match="2 of 2 jobs") as raised:
        end(late)  # type: ignore[operator]
    assert raised.value.keys == (("a",), ("b",))
    with pytest.raises(ClaimLost):
        late[0].read_bytes()
    assert complete_files(successor) == 1
    assert queue.places() == {"b": ["waiting/b"]}


def test_a_path_that_is_not_unique_ends_the_successors_job(queue: FileQueue) -> None:
    """The twin: where a claim is ``processing/<name>`` a late worker removes another's file."""
    queue.put("a")
    path = queue.processing / "a"
    os.rename(queue.waiting / "a", path)
    os.rename(path, queue.waiting / "a")  # recovered
    os.rename(queue.waiting / "a", path)  # and claimed by another worker
    path.unlink()  # the first one's completion
    assert queue.places() == {}


def test_the_others_are_ended(queue: FileQueue) -> None:
    """Where one job is lost the rest of the call is done all the same."""
    queue.put("a", "b", "c")
    files = queue.claim(3)
    files[1].path.unlink()
    with pytest.raises(ClaimLost, match=r"1 of 3 jobs.*The other 2 were changed") as raised:
        complete_files(files)
    assert raised.value.keys == (("b",),)
    assert queue.places() == {}


def test_nothing_is_overwritten_by_a_return(queue: FileQueue) -> None:
    """While an equal name waits a job cannot go back: it stays claimed, and comes later."""
    queue.put("a")
    first = queue.one()
    first.path.write_text("first", encoding="utf-8")
    put_file(queue.waiting, "a", "second")
    with pytest.raises(ClaimError, match="another job waits as"):
        release_files(first)
    with pytest.raises(ClaimError, match="another job waits as"):
        fail_files(first, retry=True)
    assert queue.recover() == []
    assert sorted(queue.places()) == ["first", "second"]
    second = queue.one("w2")
    assert second.read_text() == "second"
    assert queue.recover(worker="w1") == ["a"]
    assert queue.recover(worker="w2") == []
    complete_files(second)
    assert queue.one("w3").read_text() == "first"


def test_a_plain_rename_overwrites(queue: FileQueue) -> None:
    """The twin: a rename back loses the job that waits."""
    queue.put("a")
    first = queue.one()
    put_file(queue.waiting, "a", "second")
    os.rename(first.path, queue.waiting / "a")
    assert sorted(queue.places()) == ["a"]


def test_a_job_put_at_the_last_moment_is_not_overwritten(queue: FileQueue) -> None:
    """An equal name that comes between the look and the rename keeps its place."""
    queue.put("a")
    first = queue.one()

    def before(name: str, _: tuple[object, ...]) -> None:
        if name == "renameat2" and not (queue.waiting / "a").exists():
            put_file(queue.waiting, "a", "second")

    with before_each(before), pytest.raises(ClaimError, match="another job waits"):
        release_files(first)
    assert first.read_text() == "a"
    assert sorted(queue.places()) == ["a", "second"]


def test_an_unsafe_return_is_refused(queue: FileQueue) -> None:
    """Where no rename is known not to overwrite, no job is returned, and none is lost."""
    queue.put("a")
    file = queue.one()
    calls = [
        lambda: release_files(file),
        lambda: fail_files(file, retry=True),
        queue.recover,
    ]
    with without_renameat2():
        for call in calls:
            with pytest.raises(ClaimError, match="has no rename that never overwrites"):
                call()
        assert [path.name for path in queue.processing.iterdir() if path.name[0] != "."] == ["w1"]
        assert list(queue.waiting.iterdir()) == []
        assert complete_files(file) == 1
        queue.put("a")
        assert queue.one().attempt == 1


def test_a_link_and_an_unlink_are_not_a_return(queue: FileQueue) -> None:
    """The twin: a worker killed between the two leaves a job that two workers have."""
    queue.put("a")
    file = queue.one()
    os.link(file.path, queue.waiting / "a")
    successor = queue.one("w2")
    assert complete_files(successor) == complete_files(file) == 1


# --- recovery


def test_a_living_worker_keeps_its_jobs(queue: FileQueue) -> None:
    """A worker that gives a sign of life keeps its job, however old the job is."""
    queue.put("a", "b")
    old, other = queue.one("w1"), queue.one("w2")
    os.utime(old.path, (1, 1))
    queue.silence("w1")
    queue.silence("w2")
    touch_worker(queue.processing, "w1")
    assert queue.recover(60) == ["b"]
    assert old.path.exists()
    assert not other.path.exists()


def test_the_jobs_own_age_would_take_it_from_a_living_worker(queue: FileQueue) -> None:
    """The twin: by the file's age alone a job that is being worked on counts as abandoned."""
    queue.put("a")
    os.utime(queue.waiting / "a", (1, 1))
    file = queue.one()
    touch_worker(queue.processing, "w1")
    assert time.time() - file.path.stat().st_mtime > 60


def test_a_claim_is_a_sign_of_life(queue: FileQueue) -> None:
    """A worker that goes on claiming needs nothing else."""
    queue.put("a", "b")
    queue.claim()
    queue.silence("w1")
    queue.claim()
    assert queue.recover(60) == []


@pytest.mark.parametrize("ahead", [-7200, 7200])
def test_the_file_systems_clock_counts(
    queue: FileQueue, monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    """A machine whose clock is hours off takes no living worker's job, and misses no dead one's."""
    queue.put("a", "b")
    queue.claim(1, "alive")
    queue.claim(1, "dead")
    queue.silence("dead")
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + ahead)
    by_this_machine = time.time() - (queue.processing / "alive" / HEARTBEAT).stat().st_mtime
    assert (by_this_machine > 60) == (ahead > 0)
    assert queue.recover(60) == ["b"]


def test_a_worker_that_wakes_up_keeps_what_it_claims(queue: FileQueue) -> None:
    """Whenever in a recovery a silent worker claims again, the new job stays its own."""
    for place in range(200):
        case = FileQueue.make(queue.base / str(place))
        case.put("a", "b")
        case.claim(1, "w1")
        case.silence("w1")
        new: list[ClaimedFile] = []
        count = 0

        def before(_: str, __: tuple[object, ...]) -> None:
            nonlocal count
            if count == place:
                # An age of nothing is that of the last moment: it has to differ from `before`.
                new.extend(case.claim(2, "w1"))
            count += 1

        with before_each(before):
            case.recover(60)
        if not new:
            break
        assert all(file.path.exists() for file in new), place
        # The recovered one comes alone.
        assert [file.name for file in new] in (["a"], ["b"])
    assert place > 8


def test_looking_at_the_heartbeat_first_would_take_it(queue: FileQueue) -> None:
    """The twin: who judges before it looks finds the new job with a worker it took for dead."""
    queue.put("a")
    touch_worker(queue.processing, "w1")
    queue.silence("w1")
    silent = time.time() - (queue.processing / "w1" / HEARTBEAT).stat().st_mtime > 60
    file = queue.one("w1")
    found = list((queue.processing / "w1").glob("*/a"))
    assert silent
    assert found == [file.path]


def test_folders_of_dead_workers_are_removed(queue: FileQueue) -> None:
    """Nothing stays of a worker that is gone, and one that wakes up can work again."""
    queue.put("a", "b")
    queue.claim(2)
    assert queue.recover() == ["a", "b"]
    assert {p.name for p in queue.processing.iterdir()} == {attempts.FOLDER, recovery.TAKEN}
    assert queue.one().attempt == 2


def test_a_claim_goes_on_when_its_folders_are_removed(queue: FileQueue) -> None:
    """A worker that was taken for dead between two calls makes its folders again."""
    for place in range(100):
        case = FileQueue.make(queue.base / str(place))
        case.put("a")
        count = 0

        def before(_: str, __: tuple[object, ...]) -> None:
            nonlocal count
            if count == place:
                case.recover(0)
            count += 1

        with before_each(before):
            files = case.claim()
        places = case.places()
        assert len(places["a"]) == 1, place
        if places["a"] == ["waiting/a"]:
            # Taken back when it was claimed already: who has it learns of it at the end.
            for file in files:
                with pytest.raises(ClaimLost):
                    complete_files(file)
        else:
            assert complete_files(files) == 1
        if count <= place:
            break
    assert place > 8


def test_one_workers_jobs_alone(queue: FileQueue) -> None:
    """A worker that restarts under its old name returns its own jobs, and no others."""
    queue.put("a", "b")
    queue.claim(1, "w1")
    queue.claim(1, "w2")
    assert queue.recover(worker="w1") == ["a"]
    assert queue.recover(worker="nobody") == []
    assert queue.waits() == ["a"]


@pytest.mark.parametrize(
    "older_than",
    [-1, float("nan"), "1", True],
)
def test_wrong_age(queue: FileQueue, older_than: object) -> None:
    """An age that is none is refused by name."""
    with pytest.raises(ValueError, match="older_than is"):
        queue.recover(older_than)  # type: ignore[arg-type]


def test_an_age_as_timedelta(queue: FileQueue) -> None:
    """Seconds and a timedelta mean the same."""
    queue.put("a")
    queue.claim()
    age = timedelta(minutes=1)
    folders = {"waiting": queue.waiting, "processing": queue.processing}
    assert recover_files(**folders, older_than=age) == []
    queue.silence("w1", 90)
    assert recover_files(**folders, older_than=age) == [queue.waiting / "a"]


# --- the writer's side


def test_a_job_is_never_seen_half(queue: FileQueue, either: bool) -> None:
    """A reader between any two calls of a put sees nothing or the whole job."""
    content = "0123456789" * 10_000
    seen: list[str] = []

    def before(_: str, __: tuple[object, ...]) -> None:
        seen.extend(file.read_text() for file in queue.claim())

    with before_each(before):
        put_file(queue.waiting, "a", content)
    assert seen in ([], [content]), either
    assert len(seen) + len(queue.claim()) == 1


def test_a_job_written_in_place_is_seen_half(queue: FileQueue) -> None:
    """The twin: what is written under its own name is claimed half-written."""
    with (queue.waiting / "a").open("w") as file:
        file.write("one half, ")
        file.flush()
        claimed = queue.one().read_text()
        file.write("and the other")
    assert claimed == "one half, "


def test_put_overwrites_nothing(queue: FileQueue, either: bool) -> None:
    """An equal name is refused, the waiting job stays, and nothing half-written is left."""
    put_file(queue.waiting, "a", "first")
    with pytest.raises(ClaimError, match="of that name is there already"):
        put_file(queue.waiting, "a", "second")
    assert [p.read_text() for p in queue.waiting.iterdir()] == ["first"], either
    (queue.waiting / "b").mkdir()
    with pytest.raises(ClaimError, match="of that name is there already"):
        put_file(queue.waiting, "b", "third")
    assert sorted(p.name for p in queue.waiting.iterdir()) == ["a", "b"]


def test_a_put_that_renames_plainly_overwrites(queue: FileQueue) -> None:
    """The twin: a writer's usual rename loses the job that waits."""
    for content in ("first", "second"):
        (queue.waiting / ".new").write_text(content, encoding="utf-8")
        os.replace(queue.waiting / ".new", queue.waiting / "a")
    assert queue.one().read_text() == "second"


@pytest.mark.parametrize("durable", [True, False])
def test_put_flushes_file_and_folder(queue: FileQueue, durable: bool) -> None:
    """The content is flushed before the name is there, the name before the call returns."""
    with recorded() as calls:
        put_file(queue.waiting, "a", b"content", durable=durable)
    names = [name for name, _ in calls if name in {"fsync", "renameat2", "rename", "link"}]
    assert names == (["fsync", "renameat2", "fsync"] if durable else ["renameat2"])


@pytest.mark.parametrize("data", [b"x", bytearray(b"x"), memoryview(b"x"), "x"])
def test_put_takes_bytes_and_text(queue: FileQueue, data: bytes | str) -> None:
    """Bytes and text are written unchanged."""
    assert put_file(queue.waiting, "a", data) == queue.waiting / "a"
    assert queue.one().read_bytes() == b"x"


def test_put_writes_all(queue: FileQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that is cut short, as by a disk that is filling up, goes on where it stopped."""
    real = os.write
    monkeypatch.setattr(os, "write", lambda number, data: real(number, data[:3]))
    put_file(queue.waiting, "a", "0123456789")
    assert queue.one().read_text() == "0123456789"


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "a/b", "/a", ".hidden", "a\0b", "x" * 256, 7, b"a"]
)
def test_names_that_cannot_be_a_jobs(queue: FileQueue, name: object) -> None:
    """A name that leaves the folder, is hidden or too long is refused before anything is done."""
    with pytest.raises(ClaimError, match=r"^name is .*; expected "):
        put_file(queue.waiting, name, "x")  # type: ignore[arg-type]
    assert (
        list(queue.base.rglob("*")) == [queue.waiting, queue.processing]
        or len(list(queue.base.rglob("*"))) == 2
    )


@pytest.mark.parametrize("worker", ["", "..", "a/b", ".w", "x" * 256])
def test_workers_whose_name_is_no_folders(queue: FileQueue, worker: str) -> None:
    """A worker name that leaves the folder, is hidden or too long is refused."""
    queue.put("a")
    with pytest.raises(ClaimError, match="worker is"):
        queue.claim(1, worker)
    with pytest.raises(ClaimError, match="worker is"):
        touch_worker(queue.processing, worker)
    assert queue.waits() == ["a"]


# --- what the system refuses


def test_missing_folders_are_named(queue: FileQueue) -> None:
    """A folder that does not exist is named, and the job stays where it was."""
    queue.put("a")
    nowhere = queue.base / "nowhere"
    missing = pytest.raises(ClaimError, match=f"{nowhere}.*make the missing folder")
    waiting, processing = queue.waiting, queue.processing
    with missing:
        claim_files(waiting=waiting, processing=nowhere)
    with missing:
        claim_files(waiting=nowhere, processing=processing)
    with missing:
        put_file(nowhere, "a", "x")
    with missing:
        recover_files(waiting=waiting, processing=nowhere, older_than=0)
    with missing:
        touch_worker(nowhere, "w1")
    file = queue.one()
    with missing:
        recover_files(waiting=nowhere, processing=processing, older_than=0)
    with missing:
        complete_files(file, done=nowhere / "done")
    assert file.read_text() == "a"


def test_one_folder_for_both(queue: FileQueue) -> None:
    """The waiting and the processing folder have to be two."""
    with pytest.raises(ClaimError, match="cannot be both"):
        claim_files(waiting=queue.waiting, processing=queue.waiting)
    with pytest.raises(ClaimError, match="cannot be both"):
        recover_files(waiting=queue.waiting, processing=queue.waiting, older_than=0)


@pytest.mark.parametrize("claimed", [False, True], ids=["fresh", "claimed from"])
def test_swapped_folders(queue: FileQueue, claimed: bool) -> None:
    """Swapped folders are refused before and after the first claim, and harm no later call."""
    queue.put("a", "b")
    if claimed:
        queue.claim(1, "dead")
    swapped = {"waiting": queue.processing, "processing": queue.waiting}
    with pytest.raises(ClaimError, match="swapped"):
        claim_files(**swapped)
    with pytest.raises(ClaimError, match="swapped"):
        recover_files(**swapped, older_than=0)
    assert queue.recover() == (["a"] if claimed else [])
    assert queue.drain() == {"a": 1, "b": 1}
    # An empty queue is refused alike, once a job was claimed.
    with pytest.raises(ClaimError, match="swapped"):
        claim_files(**swapped)


def test_a_folder_below_the_waiting_one(tmp_path: Path) -> None:
    """Where all is in one folder, the folders in it are passed over."""
    processing = tmp_path / "processing"
    processing.mkdir()
    put_file(tmp_path, "a", "x")
    put_file(tmp_path, "z", "y")
    (file,) = claim_files(waiting=tmp_path, processing=processing)
    fail_files(file, "no")
    assert (tmp_path / "failed").is_dir()
    found = claim_files(9, waiting=tmp_path, processing=processing)
    assert [file.name for file in found] == ["z"]


@pytest.mark.parametrize("kind", ["link out", "link in", "pipe"])
def test_what_is_no_file_is_refused_at_its_turn(queue: FileQueue, kind: str) -> None:
    """An entry that is no file is named and left once it is next; earlier jobs are claimed."""
    queue.put("a", "c")
    outside = queue.base.parent / "outside"
    outside.write_text("secret", encoding="utf-8")
    odd = queue.waiting / "b"
    if kind == "pipe":
        os.mkfifo(odd)
    else:
        odd.symlink_to(outside if kind == "link out" else queue.waiting / "c")
    before = odd.lstat().st_ino
    assert [file.name for file in queue.claim(9)] == ["a"]
    for _ in range(2):
        with pytest.raises(ClaimError, match=f"cannot claim '{odd}': it is .*a job is a file"):
            queue.claim(9)
    assert odd.lstat().st_ino == before
    assert outside.read_text(encoding="utf-8") == "secret"
    assert queue.waits() == ["b", "c"]


def test_what_was_exchanged_for_a_link_goes_back(queue: FileQueue) -> None:
    """A file that becomes a link between the look and the rename is not handed out."""
    queue.put("a")

    def before(name: str, _: tuple[object, ...]) -> None:
        if name == "rename" and (queue.waiting / "a").is_file():
            (queue.waiting / "a").unlink()
            (queue.waiting / "a").symlink_to("/etc/passwd")

    with before_each(before), pytest.raises(ClaimError, match="symbolic link to '/etc/passwd'"):
        queue.claim()
    assert (queue.waiting / "a").is_symlink()


def test_a_link_in_place_of_a_workers_folder(queue: FileQueue) -> None:
    """A worker's folder that is a link out of the tree gets nothing."""
    queue.put("a")
    outside = queue.base.parent / "outside"
    outside.mkdir()
    (queue.processing / "w1").symlink_to(outside)
    with pytest.raises(ClaimError, match="symbolic link stands where a folder"):
        queue.claim()
    assert list(outside.iterdir()) == []
    assert queue.waits() == ["a"]


def test_a_file_in_place_of_a_folder(queue: FileQueue) -> None:
    """A file where a worker's folder should be is named."""
    queue.put("a")
    (queue.processing / "w1").write_text("", encoding="utf-8")
    with pytest.raises(
        ClaimError, match="a file or a symbolic link stands where a folder is expected"
    ):
        queue.claim()
    assert queue.waits() == ["a"]


def test_another_file_system(tmp_path: Path) -> None:
    """Folders on two file systems are refused, and the job stays where it was."""
    queue = FileQueue.make(tmp_path / "queue")
    with in_memory(tmp_path) as other:
        if other.stat().st_dev == queue.base.stat().st_dev:
            pytest.skip("there is no second file system here to write to")
        queue.put("a")
        with pytest.raises(ClaimError, match=r"EXDEV.*put all folders of a queue on one"):
            claim_files(waiting=queue.waiting, processing=other)
        assert list(other.glob("*/*-*")) == []
        file = queue.one()
        with pytest.raises(ClaimError, match="EXDEV"):
            complete_files(file, done=other)
        with pytest.raises(ClaimError, match="EXDEV"):
            fail_files(file, "no", failed=other)
        assert file.read_text() == "a"
        assert queue.places() == {"a": [str(file.path.relative_to(queue.base))]}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
@pytest.mark.parametrize(
    "operation", ["put", "claim", "complete", "done", "release", "fail", "retry", "recover"]
)
def test_a_refusal_at_any_call_loses_nothing(queue: FileQueue, operation: str, number: int) -> None:
    """Whichever changing call the system refuses, the job is in one place, or ended as asked."""
    for place in range(100):
        case = FileQueue.make(queue.base / str(place))
        case.put("a")
        if operation != "claim":
            case.claim()
            case.recover()
            file = case.one() if operation != "put" else None
        works = {
            "put": lambda: put_file(case.waiting, "b", "b"),
            "claim": case.claim,
            "complete": lambda: complete_files(file),
            "done": lambda: complete_files(file, done=case.done),
            "release": lambda: release_files(file),
            "fail": lambda: fail_files(file, "no"),
            "retry": lambda: fail_files(file, retry=True),
            "recover": case.recover,
        }
        count = 0

        def before(name: str, _: tuple[object, ...]) -> None:
            nonlocal count
            if name in CHANGING:
                count += 1
                if count == place + 1:
                    raise OSError(number, os.strerror(number))

        said = ""
        with before_each(before):
            try:
                works[operation]()
            except ClaimError as error:
                said = str(error)
        if said:
            assert errno.errorcode[number] in said
            assert str(case.base) in said
        places = case.places()
        owned = places.get("a", [])
        gone = operation == "complete" and not said
        assert len(owned) == (0 if gone else 1), (place, places)
        if operation == "put":
            assert ("b" in places) == ("Nothing was put" not in said), place
        case.recover()
        assert all(len(paths) == 1 for paths in case.places().values()), (place, case.places())
        assert all(times == 1 for times in case.drain().values())
        if count <= place:
            break
    assert 0 < place < 100


def test_no_right_to_the_folder() -> None:
    """A folder that may not be written is named, and the job stays where it was."""
    root = os.name == "posix" and os.geteuid() == 0
    # Somebody else does not reach pytest's own folders.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        queue = FileQueue.make(Path(folder) / "queue")
        queue.put("a")
        queue.waiting.chmod(0o555)
        queue.processing.chmod(0o777)
        if root:
            os.seteuid(65534)
        try:
            with pytest.raises(ClaimError, match=r"cannot claim .*EACCES.*let this user write to"):
                queue.claim(1, "w9")
            with pytest.raises(ClaimError, match=r"cannot put .*EACCES.*Nothing was put"):
                put_file(queue.waiting, "b", "x")
        finally:
            if root:
                os.seteuid(0)
            queue.waiting.chmod(0o755)
        assert queue.waits() == ["a"]


def test_a_full_disk(tmp_path: Path) -> None:
    """On a disk without a free inode claims are refused and jobs stay; room cures it."""
    import subprocess  # noqa: PLC0415 - for this test alone

    base = tmp_path / "small"
    base.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k,nr_inodes=12", "tmpfs", str(base)]
    if os.name == "nt" or os.geteuid() != 0 or subprocess.run(mount, check=False).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        queue = FileQueue.make(base / "queue")
        queue.put("a", "b")
        file = queue.one()
        ballast: list[Path] = []
        refused = pytest.raises(ClaimError, match=r"ENOSPC.*Nothing was put; the disk is full")
        with refused:
            ballast.extend(put_file(queue.waiting, f"x{number}", "x") for number in range(100))
        with pytest.raises(ClaimError, match=r"cannot claim .*ENOSPC.*left where it was"):
            queue.claim()
        assert complete_files(file) == 1
        assert [p for p in queue.waiting.iterdir() if p.name.startswith(".")] == []
        ballast.pop().unlink()
        assert queue.one().read_text() == "b"
        with pytest.raises(ClaimError, match="ENOSPC"):
            put_file(queue.waiting, "large", "x" * 100_000)
        assert queue.waits() == sorted(path.name for path in ballast)
    finally:
        subprocess.run(["umount", str(base)], check=True)


def test_a_rename_that_was_done_and_denied(queue: FileQueue) -> None:
    """Over NFS a rename can be done and reported as failed: the claim finds its file."""
    queue.put("a")
    denied = []

    def before(name: str, args: tuple[object, ...]) -> None:
        if name == "rename" and not denied:
            denied.append(args)
            os.rename(*args)  # type: ignore[arg-type]

    with before_each(before):
        file = queue.one()
        denied.clear()
        complete_files(file, done=queue.done)
    assert len(queue.places()["a"]) == 1
    assert queue.recover() == []


def test_ctrl_c_gives_back(queue: FileQueue) -> None:
    """An interrupted claim keeps nothing of what it had already."""
    queue.put("a", "b", "c")
    renames = 0

    def before(name: str, _: tuple[object, ...]) -> None:
        nonlocal renames
        renames += name == "rename"
        if renames == 3:
            renames += 1
            raise KeyboardInterrupt

    with before_each(before), pytest.raises(KeyboardInterrupt):
        queue.claim(3)
    assert queue.waits() == ["a", "b", "c"]
    assert [file.attempt for file in queue.claim(3)] == [1, 1, 1]


def test_what_is_no_claim(queue: FileQueue) -> None:
    """Paths and names that claim_files did not give are refused."""
    queue.put("a")
    with pytest.raises(ClaimError, match="is not a claimed file"):
        complete_files([queue.waiting / "a"])  # type: ignore[list-item]
    with pytest.raises(ClaimError, match="is not the path of a claimed file"):
        ClaimedFile.at(queue.waiting / "a", queue.waiting)
    with pytest.raises(ClaimError, match=r"layout is 'other'; expected one of \['plain', "):
        queue.claim(layout="other")
    assert queue.waits() == ["a"]


# --- large folders


def listings(calls: list[tuple[str, tuple[object, ...]]], folder: Path) -> int:
    """How often a folder was read."""
    return sum(name == "scandir" and args == (str(folder),) for name, args in calls)


def fill(folder: Path, count: int) -> None:
    """Make empty jobs, numbered from 0."""
    for number in range(count):
        os.close(os.open(folder / f"{number:09d}", os.O_CREAT | os.O_WRONLY))


def test_one_listing_serves_many_claims(queue: FileQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of 20,000 is read once for all these claims, and no file before it is claimed."""
    monkeypatch.setattr(listing, "SECONDS", 600.0)
    fill(queue.waiting, 20_000)
    with recorded() as calls:
        names = [queue.one().name for _ in range(500)]
    assert names == [f"{number:09d}" for number in range(500)]
    assert listings(calls, queue.waiting) == 1
    assert len(calls) < 500 * 15
    assert not any(name == "open" and str(queue.waiting) in str(args) for name, args in calls)


def test_a_listing_that_is_used_up_is_made_anew(
    queue: FileQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that comes to the end of a kept listing reads the folder once more, and no oftener."""
    monkeypatch.setattr(listing, "SECONDS", 600.0)
    fill(queue.waiting, 1500)
    queue.one()
    (queue.waiting / "later").write_text("another process's", encoding="utf-8")
    with recorded() as calls:
        assert [file.name for file in queue.claim(3000)][-1] == "later"
    assert listings(calls, queue.waiting) == 1


def test_a_listing_a_claim_grows_with_the_folder(
    queue: FileQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: without the kept listing the folder is read at every claim."""
    monkeypatch.setattr(listing, "SECONDS", 0)
    monkeypatch.setattr(listing, "READINGS", 0)
    fill(queue.waiting, 1500)
    with recorded() as calls:
        for _ in range(100):
            queue.one()
    assert listings(calls, queue.waiting) == 100


def test_a_small_folder_is_in_order_at_every_claim(queue: FileQueue) -> None:
    """Of a small folder the first name is claimed, also if it came in just before."""
    queue.put("b", "c")
    assert queue.one().name == "b"
    (queue.waiting / "a").write_text("a", encoding="utf-8")
    assert queue.one().name == "a"


def test_an_old_listing_is_made_anew(queue: FileQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others' jobs come at the latest when the listing is too old, own ones at once."""
    now = 1000.0
    monkeypatch.setattr(listing.time, "monotonic", lambda: now)
    fill(queue.waiting, 1500)
    file = queue.one()
    assert file.name == "000000000"
    (queue.waiting / "0").write_text("another process's", encoding="utf-8")
    assert queue.one().name == "000000001"
    release_files(file)
    queue.put("00")
    assert [queue.one().name for _ in range(2)] == ["00", "000000000"]
    now += 1.5
    assert queue.one().name == "0"


def test_the_number_of_listings_is_bounded(queue: FileQueue) -> None:
    """The listings of questions that are not asked again are dropped."""
    for number in range(listing.FOLDERS * 2):
        queue.claim(pattern=f"{number}*")
    assert len(listing._known) <= listing.FOLDERS


def test_listings_of_many_workers_lose_nothing(
    queue: FileQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names that others took from under a kept listing are passed over, up to its end."""
    monkeypatch.setattr(listing, "SMALL", 0)
    fill(queue.waiting, 20)
    queue.one()
    for path in sorted(queue.waiting.iterdir())[:15]:
        path.unlink()
    queue.put("z")
    assert [file.name for file in queue.claim(99)][-1] == "z"
    assert queue.waits() == []


# --- worker names


def test_a_process_has_a_worker_of_its_own(queue: FileQueue) -> None:
    """Without a name all claims of one process are one worker's, which no other process is."""
    queue.put("a", "b")
    (one,) = claim_files(waiting=queue.waiting, processing=queue.processing)
    (other,) = claim_files(waiting=queue.waiting, processing=queue.processing)
    touch_worker(queue.processing)
    assert one.worker == other.worker
    assert str(os.getpid()) in one.worker
    if hasattr(os, "fork"):
        ours, its = os.pipe()
        if (child := os.fork()) == 0:
            from atomic_claim.files import workers  # noqa: PLC0415

            os.write(its, workers.worker_name(None).encode())
            os._exit(0)
        os.waitpid(child, 0)
        theirs = os.read(ours, 300).decode()
        os.close(ours)
        os.close(its)
        assert theirs.rpartition("-")[2] != one.worker.rpartition("-")[2]
