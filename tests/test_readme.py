"""What the README shows is what happens."""

import re
from pathlib import Path

import pytest
import sqlalchemy as sa

import atomic_claim
from atomic_claim import AmbiguousTable, JobTable, claim_jobs

README = Path(__file__).parent.parent.joinpath("README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def jobs_table() -> sa.Table:
    """The table of the README's examples: a status of strings and a priority."""
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
    """The message of an ambiguous table is the one in the README, to the letter."""
    with pytest.raises(AmbiguousTable) as raised:
        claim_jobs(sa.create_engine("sqlite://"), jobs_table())
    assert f"atomic_claim.errors.AmbiguousTable: {raised.value}\n" in README


def test_the_declarations_are_accepted() -> None:
    """The JobTables of the README can be declared as they stand there."""
    jobs = jobs_table()
    for name, type_ in {
        "locked_at": sa.DateTime,
        "finished_at": sa.DateTime,
        "visible": sa.Boolean,
        "owner": sa.String(20),
        "tries": sa.Integer,
    }.items():
        jobs.append_column(sa.Column(name, type_))
    (block,) = [block for block in BLOCKS if "by_status = JobTable(" in block]
    found = {"jobs": jobs}
    exec(block, found)  # noqa: S102 - the README is ours
    assert all(isinstance(found[f"by_{kind}"], JobTable) for kind in ("status", "time", "flag"))


@pytest.mark.parametrize("block", BLOCKS)
def test_every_name_exists(block: str) -> None:
    """Whatever a block imports from the package is there."""
    for names in re.findall(r"^from atomic_claim import (.*)$", block, re.MULTILINE):
        for name in names.split(","):
            assert hasattr(atomic_claim, name.strip()) or name.strip() == "aio"


def test_the_directory_queue_works_as_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The example puts a job, claims it and ends it, well or not."""
    (block,) = [block for block in BLOCKS if "from atomic_claim.files import" in block]
    monkeypatch.chdir(tmp_path)
    for folder in ("waiting", "processing"):
        (tmp_path / "queue" / folder).mkdir(parents=True)
    ran: list[bytes] = []
    exec(block, {"run": ran.append})  # noqa: S102 - the README is ours
    assert ran == [b'{"to": "ann"}']
    assert not any(path.is_file() for path in tmp_path.rglob("*.json"))
    exec(block, {"run": int})  # noqa: S102 - the README is ours
    (failed,) = tmp_path.joinpath("queue", "failed").rglob("0001-mail.json")
    reason = failed.parent.with_name(f"{failed.parent.name}.reason")
    assert "invalid literal for int()" in reason.read_text(encoding="utf-8")
