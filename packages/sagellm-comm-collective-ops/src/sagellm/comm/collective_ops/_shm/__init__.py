"""Collectives inside a host over shared memory: one protocol, two implementations of it."""
