"""The parts of `process_group`; only they and the conformance kit import torch."""

__all__: list[str] = []
