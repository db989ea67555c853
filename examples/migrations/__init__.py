"""Migrations to copy; each is what `atomic-claim migration` writes for a table of tables.py."""
