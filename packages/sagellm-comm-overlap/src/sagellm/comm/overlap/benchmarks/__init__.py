"""Benchmarks, each runnable with `python -m`."""
