"""The checks of ``atomic-claim doctor``: what is common to all databases, and a module each."""
