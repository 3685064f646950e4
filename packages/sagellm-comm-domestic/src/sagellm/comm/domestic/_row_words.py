"""Words that rows of the vendor table share."""

from __future__ import annotations

from sagellm.core.protocols import Lowering

__all__ = ["ARITHMETIC", "FLOATS", "GB", "INTEGERS", "average", "no_bits"]

GB = 1e9
ARITHMETIC = frozenset({"sum", "min", "max", "product"})
INTEGERS = frozenset({"int8", "uint8", "bool", "int32", "int64"})
FLOATS = frozenset({"float16", "bfloat16", "float32"})


def average(library: str) -> Lowering:
    """The rule for a library without an average."""
    return Lowering("avg", "avg_as_sum_div", f"{library} has no average; sum, then divide")


def no_bits(library: str) -> tuple[Lowering, ...]:
    """Refusals of the bitwise reductions, each by name."""
    return tuple(
        Lowering(op, "refuse", f"{library} reduces by arithmetic alone")
        for op in ("band", "bor", "bxor")
    )
