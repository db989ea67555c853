"""The worker loop to copy."""
