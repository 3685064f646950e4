"""Benchmarks of this package, each runnable with `python -m`."""
