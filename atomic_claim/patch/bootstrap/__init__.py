"""A folder for ``PYTHONPATH``."""
