"""Directory queues that platformatic's job-queue (FileStorage 0.5) works on, too."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from atomic_claim import ClaimError
from atomic_claim.files import (
    ClaimedFile,
    claim_files,
    complete_files,
    recover_files,
    release_files,
)
from tests.files.file_queue import in_memory
from tests.files.file_worker import platformatic_drain
from tests.files.platformatic import FileStorage
from tests.files.system_calls import Actor, killed_before, stepwise

pytestmark = pytest.mark.once

JOBS = 1500
SCRIPT = Path(__file__).with_name("platformatic.mjs")
# The folder of an installed @platformatic/job-queue 0.5.
PACKAGE = os.environ.get("ATOMIC_CLAIM_TEST_PLATFORMATIC", "")


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[FileStorage]:
    """Yield the folders of a platformatic queue."""
    with in_memory(tmp_path) as folder:
        yield FileStorage(folder / "base")


def claim(storage: FileStorage, limit: int = 1, worker: str = "python") -> list[ClaimedFile]:
    """Claim as a Python worker does beside their consumers."""
    queue, processing = storage.base / "queue", storage.base / "processing"
    return claim_files(
        limit, waiting=queue, processing=processing, worker=worker, layout="platformatic"
    )


def recover(storage: FileStorage, older_than: float = 0) -> list[str]:
    """Recover beside their consumers; the names that wait again."""
    queue, processing = storage.base / "queue", storage.base / "processing"
    found = recover_files(
        waiting=queue, processing=processing, older_than=older_than, layout="platformatic"
    )
    return [path.name for path in found]


def waits(storage: FileStorage) -> list[str]:
    """Return the names of the waiting jobs."""
    return sorted(name for name in os.listdir(storage.base / "queue") if name[0] != ".")


def test_order_is_that_of_the_number(storage: FileStorage) -> None:
    """Names come by the number before the first dash, however long, equal ones by name."""
    names = ["9999999999999-late", "000000000002-b", "000000000002-a", "000000000010-c", "odd"]
    for name in names:
        (storage.base / "queue" / f"{name}.msg").write_text(name, encoding="utf-8")
    (storage.base / "queue" / "000000000001-other.txt").write_text("", encoding="utf-8")
    (storage.base / "queue" / ".77.1").write_text("half", encoding="utf-8")
    files = claim(storage, 9)
    assert [file.read_text() for file in files] == [names[2], names[1], names[3], names[0], "odd"]
    assert waits(storage) == ["000000000001-other.txt"]


def test_what_they_put_is_claimed_and_returned_as_theirs(storage: FileStorage) -> None:
    """A released job is one that their consumers take, under its own number."""
    for job in ("a", "b"):
        storage.enqueue(job)
    (file,) = claim(storage)
    release_files(file)
    assert waits(storage) == ["000000000001-a.msg", "000000000002-b.msg"]
    assert storage.dequeue("node") == "a"
    complete_files(claim(storage))
    assert waits(storage) == []


def test_every_interleaving_of_two_claims(storage: FileStorage) -> None:
    """Wherever either stops, each job goes to Python or to theirs, and never to both."""
    for before in range(100):
        for job in ("a", "b"):
            storage.enqueue(f"{job}{before}")
        with stepwise():
            ours = Actor(partial(claim, storage))
            ours.go(before + 1)
            ended = ours.ended
            theirs = storage.dequeue("node")
            files = ours.finish()
        assert {theirs, *(file.read_text() for file in files)} == {f"a{before}", f"b{before}"}
        storage.ack(str(theirs), "node")
        complete_files(files)
        if ended:
            break
    assert before > 8


def test_what_they_unlink_is_not_ours(storage: FileStorage) -> None:
    """Their retry, their reaper and their ``stop()`` leave a claim of ours alone."""
    storage.enqueue("a")
    (file,) = claim(storage)
    storage.register("node")
    storage.register("python-2")
    assert storage.reap() == []
    for worker in ("node", "python"):
        storage.ack("a", worker)
    storage.unregister("node")
    assert file.read_text() == "a"


def test_a_claim_under_their_name_would_be_unlinked(storage: FileStorage) -> None:
    """The twin: at ``processing/<worker>/<id>.msg`` their consumer removes the job."""
    storage.enqueue("a")
    path = storage.base / "processing" / "python" / "a.msg"
    path.parent.mkdir()
    os.rename(storage.base / "queue" / "000000000001-a.msg", path)
    storage.ack("a", "python")
    assert not path.exists()


def test_a_shared_worker_name_is_refused(storage: FileStorage) -> None:
    """The name of a consumer of theirs is refused, since it deletes its whole folder."""
    storage.enqueue("a")
    storage.register("python")
    with pytest.raises(ClaimError, match=r"python\.worker.*Choose another"):
        claim(storage)
    assert waits(storage) == ["000000000001-a.msg"]


def test_a_shared_worker_name_would_lose_jobs(storage: FileStorage) -> None:
    """The twin: their ``stop()`` takes our job with it where the names are one."""
    storage.enqueue("a")
    (file,) = claim(storage, worker="python")
    storage.unregister("python")
    assert not file.path.exists()
    assert waits(storage) == []


def test_what_their_reaper_never_returns_is_recovered(storage: FileStorage) -> None:
    """A job whose consumer died between the rename and its state goes back, to the front."""
    for job in ("a", "b"):
        storage.enqueue(job)
    storage.register("node")
    assert storage.dequeue("node") == "a"  # and dead
    assert storage.reap() == []
    assert recover(storage, 3600) == []
    assert recover(storage) == ["000000000000-a.msg"]
    assert recover(storage) == []
    assert storage.dequeue("node") == "a"
    assert FileStorage(storage.base).dequeue("other") == "b"


def test_a_recovery_of_theirs_killed_anywhere(storage: FileStorage) -> None:
    """A platformatic job whose recovery was killed waits once after the next recovery."""
    for place in range(50):
        storage.enqueue(f"a{place}")
        assert storage.dequeue("node") == f"a{place}"
        killed = killed_before(place, partial(recover, storage))
        recover(storage)
        assert waits(storage) == [f"000000000000-a{place}.msg"], place
        assert storage.dequeue("node") == f"a{place}"
        storage.ack(f"a{place}", "node")
        assert recover(storage) == []
        if not killed:
            break
    assert place > 3


def test_a_job_of_unknown_state_is_recovered(storage: FileStorage) -> None:
    """A job without a state is not returned by their reaper, and dropped if it was cancelled."""
    storage.enqueue("a")
    storage.dequeue("node")
    (storage.base / "jobs" / "a.state").unlink()
    assert recover(storage) == ["000000000000-a.msg"]


@pytest.mark.parametrize("state", ["processing:1:node", "completed:1", "failed:1"])
def test_what_is_theirs_to_return_is_left(storage: FileStorage, state: str) -> None:
    """Jobs that their reaper answers for, and those at their end, are not touched."""
    storage.enqueue("a")
    storage.register("node")
    storage.dequeue("node")
    storage.set_state("a", state)
    assert recover(storage) == []
    assert storage.reap() == (["a"] if state.startswith("processing") else [])


def test_an_idle_consumers_folder_stays(storage: FileStorage) -> None:
    """A recovery leaves their folders: a rename into one that is gone would fail."""
    storage.enqueue("a")
    storage.dequeue("node")
    storage.ack("a", "node")
    assert recover(storage) == []
    assert (storage.base / "processing" / "node").is_dir()


def test_our_own_jobs_are_recovered_as_ever(storage: FileStorage) -> None:
    """A dead Python worker's job waits again under its own number, with the attempt counted."""
    storage.enqueue("a")
    claim(storage)
    assert recover(storage) == ["000000000001-a.msg"]
    (file,) = claim(storage)
    assert (file.attempt, file.name) == (2, "000000000001-a.msg")


def test_their_consumers_and_ours_drain_one_queue(storage: FileStorage) -> None:
    """Two processes of each kind run each job once, as the work itself records it."""
    for number in range(JOBS):
        storage.enqueue(f"j{number}")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.files.file_worker"])
    team = []
    for worker in ("node-1", "python-1", "node-2", "python-2"):
        record = storage.base.parent / f"record-{worker}"
        arguments = (storage.base, worker, record)
        team.append(context.Process(target=platformatic_drain, args=arguments))
    try:
        for process in team:
            process.start()
        for process in team:
            process.join(60)
        assert [process.exitcode for process in team] == [0] * 4
    finally:
        for process in team:
            process.kill()
            process.join()
            process.close()
    records = [path.read_text().split() for path in storage.base.parent.glob("record-*")]
    assert Counter(line for lines in records for line in lines) == Counter(
        f"j{number}" for number in range(JOBS)
    )
    assert len([lines for lines in records if lines]) > 1


@pytest.fixture
def package() -> str:
    """Return the folder of the real package, or skip the test."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    if not PACKAGE:
        pytest.skip(
            "ATOMIC_CLAIM_TEST_PLATFORMATIC does not name the folder of an installed "
            "@platformatic/job-queue 0.5"
        )
    version = json.loads((Path(PACKAGE) / "package.json").read_text(encoding="utf-8"))["version"]
    assert version.startswith("0.5."), version
    return PACKAGE


def node(package: str, *words: object) -> list[str]:
    """Build the command that runs one role of the platformatic package."""
    return ["node", str(SCRIPT), package, *map(str, words)]


def test_the_real_package_beside_ours(tmp_path: Path, package: str) -> None:
    """Two producers and two consumers of theirs, and two of ours: each job runs once."""
    base = tmp_path / "base"
    FileStorage(base)
    producers = [
        subprocess.Popen(node(package, "produce", base, name, 300)) for name in ("one", "two")
    ]
    assert [process.wait(60) for process in producers] == [0, 0]
    records = [tmp_path / f"record-{number}" for number in range(4)]
    for record in records:
        record.touch()
    consumers = [
        subprocess.Popen(node(package, "consume", base, f"node-{number}", records[number]))
        for number in range(2)
    ]
    ours = [
        threading.Thread(target=platformatic_drain, args=(base, f"python-{n}", records[n], 50))
        for n in (2, 3)
    ]
    for thread in ours:
        thread.start()
    for thread in ours:
        thread.join(60)
    assert [process.wait(60) for process in consumers] == [0, 0]
    ran = Counter(line for record in records for line in record.read_text().split())
    assert ran == Counter(f"{name}-{number}" for name in ("one", "two") for number in range(300))
    shares = [len(record.read_text().split()) for record in records]
    assert sum(shares[:2]) > 0, shares
    assert sum(shares[2:]) > 0, shares


def test_the_real_package_dies_between_rename_and_state(tmp_path: Path, package: str) -> None:
    """A job that their killed consumer had moved comes back by our recovery, and theirs run it."""
    storage = FileStorage(tmp_path / "base")
    subprocess.run(node(package, "produce", storage.base, "job", 1), check=True)
    died = subprocess.run(node(package, "die", storage.base, "node-1"), check=False)
    assert died.returncode == -signal.SIGKILL
    assert waits(storage) == []
    assert recover(storage) == ["000000000000-job-0.msg"]
    record = tmp_path / "record"
    subprocess.run(node(package, "consume", storage.base, "node-2", record), check=True)
    assert record.read_text(encoding="utf-8") == "job-0\n"
    assert storage.state("job-0").startswith("completed:")
