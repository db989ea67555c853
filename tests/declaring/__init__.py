"""Declarations of tables, inferred or written."""
