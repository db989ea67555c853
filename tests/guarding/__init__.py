"""The guard inside the database."""
