"""Giving a frame to a copy worker, where both of its ends are in shared memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sagellm.core.protocols import MemoryRuns, Reference

from ._copy import Paired
from ._copy_workers import Job, Working
from ._segment import View, locate
from .memory import Ints

__all__ = ["InFiles", "Offloaded", "offload"]

_SHARED_BYTES = 4 << 20
"""Less is copied sooner than a worker is told of it and has answered."""
_SHARE = 7
"""Sixteenths that a worker gets: it begins later."""


class InFiles(ABC):
    """A reference whose runs lie in memory files, which other processes can map, too."""

    @abstractmethod
    def files(self, sources: MemoryRuns) -> tuple[Sequence[View], Ints, Ints] | None:
        """The files, and for each run the number of its file and its offset there.

        None when the runs are in no files.
        """


class Offloaded(NamedTuple):
    """What a worker does of a frame: its first batches.

    Attributes:
        batches: How many.
        working: The worker's job, to be waited for.

    """

    batches: int
    working: Working


def offload(
    reference: Reference,
    paired: Paired,
    batches: Ints,
    units: tuple[MemoryRuns, Ints, NDArray[np.uint64]] | None,
    given_up: Callable[[], bool],
    timeout_s: float,
) -> Offloaded | None:
    """Have a worker copy, and check if there are units; None when no worker does it.

    A worker that shares gets half of what is large and not checked, and nothing else.

    Args:
        reference: What is copied.
        paired: Stretches.
        batches: Rows of stretches from, to, and units from, to.
        units: Where each unit lies, with seeds and sums.
        given_up: Whether nobody waits for it any more.
        timeout_s: Longest time.

    """
    target = locate(MemoryRuns(paired.addresses, paired.sources.lengths))
    if target is None:
        return None
    found: set[int] = set(target.which.tolist())
    if len(found) != 1:
        return None
    segment = target.segments[found.pop()]
    if segment.workers is None or not len(segment.workers):
        return None
    count = len(batches)
    if segment.workers.shares:
        count = count * _SHARE // 16
        if paired.ends[-1] < _SHARED_BYTES or not count or units is not None:
            return None
    sources = reference.files(paired.sources) if isinstance(reference, InFiles) else None
    if sources is None:
        return None
    files, which, places = sources
    for file in files:
        file.readers.add(segment.workers)
    stretches = (which, places, target.offsets, paired.sources.lengths)
    stop, units_stop = int(batches[count - 1, 1]), int(batches[count - 1, 3])
    columns = np.empty((4, 0), dtype=np.uint64)
    if units is not None:
        whole, seeds, sums = units
        addresses, lengths = whole.addresses, whole.lengths
        columns = np.stack([c[:units_stop].astype(np.uint64) for c in
                            (addresses - segment.address, lengths, seeds, sums)])  # fmt: skip
    job = Job(
        {f.number: (f.nbytes, f.fd) for f in files},
        np.stack([c[:stop] for c in stretches]).astype(np.uint64),
        batches[:count].astype(np.uint64),
        columns,
    )
    working = segment.workers.begin(job, given_up, timeout_s)
    return None if working is None else Offloaded(count, working)
