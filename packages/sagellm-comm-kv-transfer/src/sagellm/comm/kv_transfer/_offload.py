"""Giving a frame to a copy worker, where both of its ends are in shared memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from sagellm.core.protocols import MemoryRuns, Reference

from ._copy import Paired
from ._copy_workers import Job
from ._segment import View, locate
from .memory import Ints

__all__ = ["InFiles", "offload"]


class InFiles(ABC):
    """A reference whose runs lie in memory files, which other processes can map, too."""

    @abstractmethod
    def files(self, sources: MemoryRuns) -> tuple[Sequence[View], Ints, Ints] | None:
        """The files, and for each run the number of its file and its offset there.

        None when the runs are in no files.
        """


def offload(
    reference: Reference,
    paired: Paired,
    batches: Ints,
    units: tuple[MemoryRuns, Ints, NDArray[np.uint64]] | None,
    given_up: Callable[[], bool],
    timeout_s: float,
) -> list[int] | None:
    """Have a worker copy, and check if there are units; None when no worker has done it.

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
    sources = reference.files(paired.sources) if isinstance(reference, InFiles) else None
    if sources is None:
        return None
    files, which, places = sources
    for file in files:
        file.readers.add(segment.workers)
    stretches = (which, places, target.offsets, paired.sources.lengths)
    columns = np.empty((4, 0), dtype=np.uint64)
    if units is not None:
        whole, seeds, sums = units
        addresses, lengths = whole.addresses, whole.lengths
        columns = np.stack([c.astype(np.uint64) for c in (addresses - segment.address, lengths,
                                                         seeds, sums)])  # fmt: skip
    job = Job(
        {f.number: (f.nbytes, f.fd) for f in files},
        np.stack(stretches).astype(np.uint64),
        batches.astype(np.uint64),
        columns,
    )
    return segment.workers.run(job, given_up, timeout_s)
