"""Copying runs to runs: no object and no call per block, one call per stretch of both sides."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np

from sagellm.core.protocols import MemoryRuns

from .memory import Ints

__all__ = ["Paired", "mover", "pair"]

_HOLD_BYTES = 1 << 20
"""Stretches up to this are copied without letting go of the GIL, about 0.1 ms: beside a thread
that computes in Python, every time it is let go costs a switch interval of 5 ms."""


class Paired(NamedTuple):
    """Stretches that are contiguous on both sides.

    Attributes:
        sources: Where they come from.
        addresses: Where they go.
        ends: Bytes up to the end of each, from the beginning of the first.

    """

    sources: MemoryRuns
    addresses: Ints
    ends: Ints


def pair(sources: MemoryRuns, targets: MemoryRuns, cuts: Ints) -> Paired:
    """Cut two lists of runs of equal size where either is cut, and where `cuts` says.

    Args:
        sources: Runs on one side; neighbours that touch are joined.
        targets: Runs on the other side, in the same order.
        cuts: Further places to cut, in bytes from the start.

    """
    a, b = _joined(sources), _joined(targets)
    if len(a.lengths) == len(b.lengths) == 1 and not len(cuts):  # a small transfer
        return Paired(a, b.addresses, a.lengths)
    a_ends, b_ends = np.cumsum(a.lengths), np.cumsum(b.lengths)
    ends = np.unique(np.concatenate((a_ends, b_ends, cuts)))
    starts = np.concatenate((np.zeros(1, np.int64), ends[:-1]))
    i = np.searchsorted(a_ends, starts, side="right")
    j = np.searchsorted(b_ends, starts, side="right")
    from_ = a.addresses[i] + (starts - (a_ends[i] - a.lengths[i]))
    to = b.addresses[j] + (starts - (b_ends[j] - b.lengths[j]))
    return Paired(MemoryRuns(from_, ends - starts), to, ends)


def _joined(runs: MemoryRuns) -> MemoryRuns:
    addresses, lengths = runs
    if len(addresses) < 2:
        return runs
    first = np.flatnonzero(addresses[1:] != addresses[:-1] + lengths[:-1]) + 1
    if len(first) + 1 == len(addresses):
        return runs
    first = np.concatenate((np.zeros(1, np.int64), first))
    return MemoryRuns(addresses[first], np.add.reduceat(lengths, first))


_Call: TypeAlias = "Callable[[int, int, int], None]"


@functools.cache
def _calls() -> tuple[_Call, _Call]:
    """`memmove` holding the GIL, and letting go of it; loaded when first needed."""
    found = []
    for library in (ctypes.PyDLL(None), ctypes.CDLL(None)):
        call = library.memmove
        call.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
        call.restype = None
        found.append(call)
    return found[0], found[1]


def mover(sources: MemoryRuns, addresses: Ints) -> Callable[[int, int], int]:
    """Copies runs of this process's address space; the caller answers for every address."""
    stretches = list(
        zip(addresses.tolist(), sources.addresses.tolist(), sources.lengths.tolist(), strict=True)
    )

    hold, free = _calls()

    def move(low: int, high: int) -> int:
        for to, from_, n in stretches[low:high]:
            (hold if n <= _HOLD_BYTES else free)(to, from_, n)
        return 0

    return move
