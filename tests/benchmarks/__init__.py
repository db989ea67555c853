"""What a claim costs, beside the bare driver and beside others: ``python -m tests.benchmarks``.

Every figure is a ratio of things that were measured in turns, in one run, so that what else the
machine does falls on both.
"""
