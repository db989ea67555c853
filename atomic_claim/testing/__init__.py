"""Proofs for a test suite of the user's own."""
