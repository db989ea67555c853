"""Installed packages, patched."""
