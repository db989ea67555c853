"""Benchmarks of claims against the bare driver and other queues: ``python -m tests.benchmarks``.

Every figure is a ratio of things that were measured in turns, in one run, so that what else the
machine does falls on both.
"""
