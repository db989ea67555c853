"""A file a trap; each test has a twin that builds the uncured form and sees the trap spring."""
