"""Leases, heartbeats and the ends of claims."""
