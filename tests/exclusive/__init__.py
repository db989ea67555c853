"""Exclusive keys."""
