"""Legacy functions that take files from a folder, patched."""

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from atomic_claim import PatchError, claims, patch_claims
from atomic_claim.files import ClaimedFile, complete_files, put_file
from atomic_claim.patch.file import load_patches

pytestmark = pytest.mark.once

HERE = __name__


class Inbox:
    """A queue of files, as people write it: list, read, write a copy, unlink."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def take(self, count: int = 10) -> list[Path]:
        """Move some files to the processing folder, by hand."""
        taken = []
        for path in sorted(self.folder.iterdir())[:count]:
            copy = self.folder.parent / "processing" / path.name
            copy.write_bytes(path.read_bytes())
            path.unlink()
            taken.append(copy)
        return taken


def next_text(folder: Path, *, dry: bool = False) -> str | None:
    """Remove the first file and return its content."""
    for path in sorted(folder.iterdir()):
        text = path.read_text()
        if not dry:
            path.unlink()
        return text
    return None


async def take_async(folder: Path) -> list[Path]:
    """Move some files to the processing folder in a coroutine."""
    return Inbox(folder).take()


def each(folder: Path) -> Iterator[Path]:
    """Move some files to the processing folder and yield them one by one."""
    yield from Inbox(folder).take()


async def each_async(folder: Path) -> AsyncIterator[Path]:
    """Move some files and yield them one by one from an asynchronous generator."""
    for path in Inbox(folder).take():
        yield path


@pytest.fixture
def waiting(tmp_path: Path) -> Path:
    """Create a folder with three jobs, and a folder for claimed jobs beside it."""
    folder = tmp_path / "waiting"
    folder.mkdir()
    (tmp_path / "processing").mkdir()
    for name in "cab":
        put_file(folder, name, name.upper().encode(), durable=False)
    return folder


def read_and_end(file: ClaimedFile) -> str:
    """Return the content of the file, as the legacy function does, and complete the job."""
    text = file.read_text()
    complete_files(file)
    return text


def test_a_batch_of_paths(waiting: Path) -> None:
    """A method's folder and limit are read from the call, and its list of paths is claimed ones."""
    with patch_claims(f"{HERE}:Inbox.take", directory="self.folder", limit="count") as patch:
        first, second = Inbox(waiting).take(2), Inbox(waiting).take()
        assert [[path.name for path in each] for each in (first, second)] == [["a", "b"], ["c"]]
        assert all(path.is_relative_to(waiting.parent / "processing") for path in first)
        assert first[0].read_text() == "A"
        assert Inbox(waiting).take() == []
    assert (patch.calls, patch.claimed) == (3, 3)
    assert Inbox(waiting).take() == []


def test_two_workers_of_the_loop_take_one_file(
    waiting: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: between its read and its unlink, another call of the loop takes the same file."""
    taken: list[Path] = []
    unlink = Path.unlink

    def meanwhile(path: Path, **options: Any) -> None:
        monkeypatch.setattr(Path, "unlink", unlink)
        taken.extend(Inbox(waiting).take(1))
        unlink(path, missing_ok=True, **options)

    monkeypatch.setattr(Path, "unlink", meanwhile)
    taken += Inbox(waiting).take(1)
    assert [path.name for path in taken] == ["a", "a"]


def test_one_content(waiting: Path) -> None:
    """A function that gives a content, and None if there is none, does so; `when` is heeded."""
    options: dict[str, Any] = {"directory": "folder", "returns": read_and_end, "when": "not dry"}
    with patch_claims(f"{HERE}:next_text", **options) as patch:
        assert next_text(waiting, dry=True) == "A"
        assert [next_text(waiting) for _ in range(4)] == ["A", "B", "C", None]
    assert (patch.claimed, patch.passed_through) == (3, 1)
    assert [path for path in waiting.parent.rglob("*") if path.name in set("abc")] == []


def test_nothing_may_be_an_exception(waiting: Path) -> None:
    """`empty=` is raised if it is an exception."""
    options: dict[str, Any] = {"directory": waiting, "pattern": "x*", "empty": LookupError("none")}
    options["ignore"] = ["folder", "dry"]
    with patch_claims(next_text, **options), pytest.raises(LookupError, match="none"):
        next_text(waiting)


def test_coroutines_and_generators(waiting: Path) -> None:
    """Whatever kind of function it is, it stays of that kind."""

    async def collected() -> list[str]:
        return [path.name async for path in each_async(waiting)]

    given: dict[str, Any] = {"directory": "folder", "limit": lambda _: 1}
    with patch_claims(f"{HERE}:take_async", **given):
        assert [path.name for path in asyncio.run(take_async(waiting))] == ["a"]
    with patch_claims(f"{HERE}:each", **given):
        assert [path.name for path in each(waiting)] == ["b"]
    with patch_claims(f"{HERE}:each_async", **given):
        assert asyncio.run(collected()) == ["c"]


def test_as_a_decorator(waiting: Path) -> None:
    """`claims(directory=...)` decorates, and keeps what the function is called."""

    @claims(directory="folder", processing=waiting.parent / "mine", limit=None, worker="w1")
    def take(folder: Path) -> list[Path]:
        raise AssertionError(folder)

    (waiting.parent / "mine").mkdir()
    found = take(waiting)
    assert [path.name for path in found] == ["a", "b", "c"]
    assert all(path.is_relative_to(waiting.parent / "mine" / "w1") for path in found)
    assert take.__name__ == "take"


def test_from_a_file_of_patches(waiting: Path, tmp_path: Path) -> None:
    """A directory queue is patched from a TOML file as a table is."""
    path = tmp_path / "patches.toml"
    path.write_text(
        f'[patches."{HERE}:Inbox.take"]\ndirectory = "self.folder"\nlimit = "count"\n',
        encoding="ascii",
    )
    (patch,) = load_patches(path)
    with patch:
        assert [path.name for path in Inbox(waiting).take(2)] == ["a", "b"]


def test_a_folder_that_a_module_names(
    waiting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of patches names the folder as it names any object, by its module."""
    monkeypatch.setattr(sys.modules[__name__], "SPOOL", waiting, raising=False)
    path = tmp_path / "patches.toml"
    path.write_text(
        f'[patches."{HERE}:Inbox.take"]\ndirectory = "{HERE}:SPOOL"\nlimit = "count"\n',
        encoding="ascii",
    )
    with load_patches(path)[0]:
        assert [path.name for path in Inbox(tmp_path / "elsewhere").take(2)] == ["a", "b"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "neither": ({}, "table= or directory="),
    "both": ({"directory": "folder", "table": "x:Y"}, "table cannot go with directory="),
    "a lease": ({"directory": "folder", "lease": 5}, "lease cannot go with directory="),
    "no path": ({"directory": 5}, "directory=5 of .*: expected a path"),
    "a limit of nothing": ({"directory": "folder", "limit": 0}, "limit=0"),
}


@pytest.mark.parametrize("options", REFUSED)
def test_what_does_not_fit_is_refused_at_once(options: str) -> None:
    """Before the first call, by a message that names it."""
    given, said = REFUSED[options]
    with pytest.raises(PatchError, match=said):
        patch_claims(f"{HERE}:next_text", **given)
