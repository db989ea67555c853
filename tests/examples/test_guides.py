"""Tests that the README and the guides show the real behaviour."""

import ast
import re
from pathlib import Path

import pytest
import sqlalchemy as sa

import atomic_claim
from atomic_claim import AmbiguousTable, JobTable, claim_jobs
from tests.guides import GUIDES, PATHS, blocks

pytestmark = pytest.mark.once

PYTHON = [(topic, block) for topic in GUIDES for block in blocks(topic, "python")]


def jobs_table() -> sa.Table:
    """Build the table of the guide, with a string status and a priority."""
    return sa.Table(
        "jobs",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("status", sa.String(20)),
        sa.Column("priority", sa.Integer),
        sa.Column("payload", sa.Text),
        sa.Column("created_at", sa.DateTime),
    )


def test_the_refusal_reads_as_shown() -> None:
    """The message of an ambiguous table is the one in the guide, to the letter."""
    with pytest.raises(AmbiguousTable) as raised:
        claim_jobs(sa.create_engine("sqlite://"), jobs_table())
    assert f"atomic_claim.errors.AmbiguousTable: {raised.value}\n" in GUIDES["declaring_tables"]


def test_the_declarations_are_accepted() -> None:
    """The JobTables of the guide can be declared as they stand there."""
    jobs = jobs_table()
    for name, type_ in {
        "locked_at": sa.DateTime,
        "finished_at": sa.DateTime,
        "visible": sa.Boolean,
        "owner": sa.String(20),
        "tries": sa.Integer,
    }.items():
        jobs.append_column(sa.Column(name, type_))
    (block,) = [block for block in blocks("declaring_tables", "python") if "by_status" in block]
    found = {"jobs": jobs}
    exec(block, found)  # noqa: S102 - the guides are ours
    assert all(isinstance(found[f"by_{kind}"], JobTable) for kind in ("status", "time", "flag"))


@pytest.mark.parametrize(("topic", "block"), PYTHON)
def test_every_name_exists(topic: str, block: str) -> None:
    """Whatever a block imports from the package is there."""
    if ">>>" not in block:
        ast.parse(block, filename=str(PATHS[topic]))
    for names in re.findall(r"^from atomic_claim import (.*)$", block, re.MULTILINE):
        for name in names.split(","):
            assert hasattr(atomic_claim, name.strip()) or name.strip() == "aio"


def test_the_directory_queue_works_as_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The example puts a job, claims it and ends it, well or not."""
    (block,) = blocks("directory_queue", "python")
    monkeypatch.chdir(tmp_path)
    for folder in ("waiting", "processing"):
        (tmp_path / "queue" / folder).mkdir(parents=True)
    ran: list[bytes] = []
    exec(block, {"run": ran.append})  # noqa: S102 - the guides are ours
    assert ran == [b'{"to": "ann"}']
    assert not any(path.is_file() for path in tmp_path.rglob("*.json"))
    exec(block, {"run": int})  # noqa: S102 - the guides are ours
    assert tmp_path.joinpath("queue", "failed", "0001-mail.json").is_file()
    reason = tmp_path.joinpath("queue", "failed", "0001-mail.json.reason")
    assert "invalid literal for int()" in reason.read_text(encoding="utf-8")


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


# A guide that is longer answers more than one question, unless it shows what commands print.
LONGEST = {
    "README": 180,
    "legacy_app": 150,
    "declaring_tables": 140,
    "retries_and_dead_letters": 180,
}


@pytest.mark.parametrize("topic", GUIDES)
def test_guides_stay_short(topic: str) -> None:
    """Each guide answers one question, and chapters of the README go into guides."""
    assert len(GUIDES[topic].splitlines()) <= LONGEST.get(topic, 120)
