"""Rules of the project's own code, and its test servers."""
