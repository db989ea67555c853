"""The README, the guides and their examples."""
