"""Benchmarks of this package; each runs alone with `python -m`."""
