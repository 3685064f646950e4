"""Benchmarks of this package; each runs with `python -m` and takes `--quick`."""

__all__: list[str] = []
