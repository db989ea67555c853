"""Proofs for a test suite of the user's own.

.. code-block:: python

    from atomic_claim.testing import race

    def test_no_job_is_handed_out_twice():
        assert race("myapp.jobs:claim", table="myapp.models:Job", url=URL).duplicates == 0
"""

from .database import CommandError as RaceError
from .racing import race
from .results import Call, Race

__all__ = ["Call", "Race", "RaceError", "race"]
