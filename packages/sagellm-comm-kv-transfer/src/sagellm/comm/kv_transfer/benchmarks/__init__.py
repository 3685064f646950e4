"""Benchmarks of the channel and its codecs, each runnable with `python -m`."""

__all__: list[str] = []
