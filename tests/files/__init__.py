"""Directory queues."""
