"""Tests that the README and the guides show the real behaviour."""

import ast
import re
from pathlib import Path

import pytest
import sqlalchemy as sa

import atomic_claim
from tests.guides import GUIDES, PATHS, blocks

pytestmark = pytest.mark.once

PYTHON = [(topic, block) for topic in GUIDES for block in blocks(topic, "python")]


@pytest.mark.parametrize(("topic", "block"), PYTHON)
def test_every_name_exists(topic: str, block: str) -> None:
    """Whatever a block imports from the package is there."""
    if ">>>" not in block:
        ast.parse(block, filename=str(PATHS[topic]))
    for names in re.findall(r"^from atomic_claim import (.*)$", block, re.MULTILINE):
        for name in names.split(","):
            assert hasattr(atomic_claim, name.strip()) or name.strip() == "aio"


def test_the_first_example_runs_as_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The README's one complete example prints what stands below it."""
    (block,) = [block for block in blocks("README", "python") if "create_engine" in block]
    (shown,) = blocks("README", "text")
    monkeypatch.chdir(tmp_path)
    found: dict[str, object] = {}
    exec(block, found)  # noqa: S102 - the guides are ours
    assert isinstance(found["engine"], sa.Engine)
    found["engine"].dispose()
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize("topic", GUIDES)
def test_links_lead_somewhere(topic: str) -> None:
    """Every relative link of a guide names a file that is there."""
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", GUIDES[topic]):
        assert PATHS[topic].parent.joinpath(target).exists(), target


def test_the_index_names_every_guide() -> None:
    """Both tables of guides list them all, and read alike."""
    (index,) = re.findall(r"^\| I have .*?\n\n", GUIDES["index"] + "\n", re.DOTALL | re.MULTILINE)
    assert sorted(re.findall(r"\]\((\w+)/README.md\)", index)) == sorted(
        set(GUIDES) - {"README", "index"}
    )
    assert index.replace("](", "](examples/") in GUIDES["README"]


@pytest.mark.parametrize("topic", GUIDES)
def test_guides_stay_short(topic: str) -> None:
    """Each guide answers one question, and chapters of the README go into guides."""
    assert len(GUIDES[topic].splitlines()) <= (180 if topic == "README" else 120)
