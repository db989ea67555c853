"""The application's own tests, which know one worker only."""

import os

import pytest
from legacy_app.models import Base, Customer, Job
from legacy_app.worker import claim, work
from sqlalchemy import create_engine, func, select
from sqlalchemy.orm import Session


@pytest.fixture
def session():
    """Yield a session with seven mails for one customer."""
    engine = create_engine(os.environ.get("LEGACY_APP_URL", "sqlite://"))
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        ann = Customer(email="ann@example.org")
        session.add_all(Job(customer=ann, subject=f"Mail {number}") for number in range(7))
        session.commit()
        yield session
    Base.metadata.drop_all(engine)


def test_a_claim_is_marked(session):
    """A claim returns at most the requested number of jobs, and none of them twice."""
    first = claim(session, 3)
    assert [job.processing for job in first] == [True, True, True]
    second = claim(session)
    assert len(second) == 4
    assert {job.id for job in first}.isdisjoint(job.id for job in second)
    assert not claim(session)


def test_every_mail_is_sent(session):
    """One worker sends every mail once."""
    sent = []
    assert work(session, lambda email, subject: sent.append((email, subject)), limit=2) == 7
    assert sorted(sent) == [("ann@example.org", f"Mail {number}") for number in range(7)]
    assert session.scalar(select(func.count()).where(Job.completed_at == None)) == 0  # noqa: E711
