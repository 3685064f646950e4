"""A known pattern through every operation, because some drivers report success and do nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, cast

from sagellm.core.protocols import CommBackendProtocol, KVBlock, P2POp

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["run_self_test"]

logger = logging.getLogger(__name__)

_ROWS = 4
_STANDS_ON = {
    "all_gather": "all_gather_into_tensor",
    "reduce_scatter": "reduce_scatter_tensor",
    "all_to_all": "all_to_all_single",
    "recv": "send",
    "send_kv_blocks": "batch_p2p",
}
"""Which operation another sends its parts by."""


def run_self_test(backend: CommBackendProtocol) -> tuple[str, ...]:
    """Names of the operations whose result was wrong on this rank, in the order they ran.

    Collective. An operation that raises is wrong and ends the test, for the group may be dead
    then; one that stands on another that was wrong is wrong too.
    Small integers in float32, so that every order of summation gives the same bits. Costs one
    small call per operation.
    """
    wrong: list[str] = []
    for name, check in _checks(backend):
        if name not in backend.capabilities.ops:
            continue
        if _STANDS_ON.get(name) in wrong:
            wrong.append(name)  # it would read rubbish, such as sizes that were never received
            continue
        try:
            if not check():
                wrong.append(name)
        except Exception as e:  # rubbish in a result may surface as anything
            logger.warning("self-test of %s: %s failed: %s", backend.name, name, e)
            return (*wrong, name)
    return tuple(wrong)


def _checks(backend: CommBackendProtocol) -> Iterator[tuple[str, Callable[[], bool]]]:
    import torch

    rank, size = backend.rank, backend.size

    def mark(source: int, target: int = 0) -> Tensor:
        """Rank `source`'s part for rank `target`: no two alike, and none of it zero."""
        x = backend.empty((_ROWS,), torch.float32)
        x.copy_(torch.arange(1, _ROWS + 1, dtype=torch.float32) + 16 * source + 256 * target)
        return x

    def blank(rows: int = _ROWS) -> Tensor:
        return backend.empty((rows,), torch.float32).fill_(-1)

    def joined(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts)

    every = [mark(r) for r in range(size)]
    ours = [mark(r, rank) for r in range(size)]
    total = torch.stack([x.cpu() for x in every]).sum(0)
    total_here = torch.stack([x.cpu() for x in ours]).sum(0)
    parts = [mark(rank, t) for t in range(size)]

    def all_reduce() -> bool:
        return _same(backend.all_reduce(mark(rank)), total)

    def all_gather_into_tensor() -> bool:
        out = blank(_ROWS * size)
        backend.all_gather_into_tensor(out, mark(rank))
        return _same(out, joined(every))

    def reduce_scatter_tensor() -> bool:
        out = blank()
        backend.reduce_scatter_tensor(out, joined(parts))
        return _same(out, total_here)

    def all_to_all_single() -> bool:
        out = blank(_ROWS * size)
        backend.all_to_all_single(out, joined(parts))
        return _same(out, joined(ours))

    def all_gather() -> bool:
        return _same_lists(backend.all_gather(mark(rank)), every)

    def reduce_scatter() -> bool:
        return _same(backend.reduce_scatter(parts), total_here)

    def all_to_all() -> bool:
        return _same_lists(backend.all_to_all(parts), ours)

    def broadcast() -> bool:
        x = mark(rank)
        return _same(backend.broadcast(x, size - 1), every[size - 1])

    def reduce() -> bool:
        x = backend.reduce(mark(rank), 0)
        return rank != 0 or _same(x, total)

    def gather() -> bool:
        found = backend.gather(mark(rank), 0)
        return rank != 0 or _same_lists(found, every)

    def scatter() -> bool:
        out = blank()
        backend.scatter(out, [mark(0, t) for t in range(size)] if rank == 0 else None, 0)
        return _same(out, mark(0, rank))

    def passed_on(sends: bool) -> bool:
        """One direction between ranks 2k and 2k + 1; an odd rank out has nothing to check."""
        other = rank ^ 1
        if other >= size:
            return True
        if sends:
            backend.send(mark(rank), other)
            return True
        out = blank()
        backend.recv(out, other)
        return _same(out, every[other])

    def send() -> bool:
        return passed_on(rank % 2 == 0)

    def recv() -> bool:
        return passed_on(rank % 2 == 1)

    def send_kv_blocks() -> bool:
        other = rank ^ 1
        if other >= size:
            return True
        if rank % 2 == 0:
            backend.send_kv_blocks([mark(rank), mark(rank, 1)], other)
            return True
        found = cast("list[KVBlock]", backend.recv_kv_blocks(other))
        return _same_lists([block.tensor for block in found], [every[other], mark(other, 1)])

    def batch_p2p() -> bool:
        if size == 1:
            return True
        out = blank()
        after, before = (rank + 1) % size, (rank - 1) % size
        works = backend.batch_p2p([P2POp("send", mark(rank), after), P2POp("recv", out, before)])
        for work in works:
            work.wait()
        return _same(out, every[before])

    def barrier() -> bool:
        backend.barrier()
        return True

    for check in (
        barrier, all_reduce, all_gather_into_tensor, reduce_scatter_tensor, all_to_all_single,
        all_gather, reduce_scatter, all_to_all, broadcast, reduce, gather, scatter, send, recv,
        batch_p2p, send_kv_blocks,
    ):  # fmt: skip
        yield check.__name__, check


def _same(found: object, wanted: Tensor) -> bool:
    import torch

    return bool(torch.equal(cast("torch.Tensor", found).cpu(), wanted.cpu()))


def _same_lists(found: object, wanted: list[Tensor]) -> bool:
    tensors = cast("list[Tensor]", found)
    return len(tensors) == len(wanted) and all(map(_same, tensors, wanted))
