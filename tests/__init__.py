"""Tests of atomic_claim, against real servers."""
