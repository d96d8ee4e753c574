"""`make bench`: how fast and how small the service is, beside the least that is possible and beside its peers.

A figure is a function in `figures/` that takes a `Lab` and returns rows of values; `figures/__init__.py` lists them.
What is compared takes turns within one run, so that all meet the same machine. Times are wall clock, CLOCK_MONOTONIC.
"""
