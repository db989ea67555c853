"""The proof that stays: by the patches of pyproject.toml no mail goes to two workers."""

from pathlib import Path

from atomic_claim.testing import race

PATCHES = Path(__file__).parent.parent / "pyproject.toml"


def test_no_job_is_handed_out_twice():
    """Four workers race for the jobs, and each job goes to one of them."""
    found = race("legacy_app.worker:claim", table="legacy_app.models:Job", patches=PATCHES)
    assert found.duplicates == 0
    assert found.lost == 0
