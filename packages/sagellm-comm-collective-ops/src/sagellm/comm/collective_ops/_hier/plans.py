"""The steps of each operation: inside hosts, between hosts, inside hosts.

Between hosts every byte crosses once in each direction it has to, whichever way ranks are
numbered: a flat ring over interleaved ranks sends three times as much. Large all_reduces go in
pieces, so that the next piece is added up on the host while one is on the wire.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sagellm.core.protocols import CommBackendProtocol, ReduceOp, UnsupportedOperationError
from sagellm.core.protocols.process_group import RawCall

from .fold import Fold
from .partition import HostMap
from .wire import Wire, finish

__all__ = ["PLANNED", "Plans"]

PLANNED = frozenset(
    {"all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce", "barrier"}
)
"""Operations with a plan; the others go over the flat group."""

_IN_FLIGHT = 2
"""Pieces between hosts at once: one on the wire, one behind it so that the wire never waits."""


class Plans:
    """Runs operations of one rank, one at a time.

    Args:
        map: Where ranks are.
        intra: The group of this host's ranks; None where this rank is alone on it.
        leaders: Between hosts, on leaders; None elsewhere.
        rail: Between the ranks of this place on all hosts; None where hosts are unequal.
        chunk_bytes: Size of a piece.

    """

    def __init__(
        self,
        map: HostMap,
        intra: CommBackendProtocol | None,
        leaders: Wire | None,
        rail: Wire | None,
        *,
        chunk_bytes: int,
    ) -> None:
        self._map = map
        self._intra = intra
        self._leaders = leaders
        self._rail = rail
        self._chunk_bytes = chunk_bytes
        self._order = torch.tensor(map.order)

    @property
    def has_rails(self) -> bool:
        """Whether `two_d` can run."""
        return self._rail is not None

    def run(self, call: RawCall, *, rails: bool = False) -> None:
        """Run one planned operation to its end, an all_reduce over all `rails` or by leaders."""
        end = time.monotonic() + call.timeout_s
        op = ReduceOp.SUM if call.reduce_op is None else call.reduce_op
        if call.op == "all_reduce":
            self._all_reduce(call.outputs[0], op, end, rails)
        elif call.op == "all_gather":
            self._all_gather(call.outputs[0], call.inputs[0], end)
        elif call.op == "reduce_scatter":
            self._reduce_scatter(call.outputs[0], call.inputs[0], op, end)
        elif call.op == "broadcast":
            assert call.peer is not None
            self._broadcast(call.outputs[0], call.peer, end)
        elif call.op == "reduce":
            assert call.peer is not None
            self._reduce(call.outputs[0], call.peer, op, end)
        elif call.op == "barrier":
            self._barrier(end)
        else:
            raise UnsupportedOperationError(f"hier has no plan for {call.op}")

    # -- all_reduce -------------------------------------------------------------------------

    def _all_reduce(self, x: Tensor, op: ReduceOp, end: float, rails: bool) -> None:
        flat = x.view(-1)
        each = max(1, self._chunk_bytes // flat.itemsize)  # the same on every host
        steps = self._by_leaders
        if rails:
            locals_ = len(self._map.mine)
            each += -each % locals_
            whole = flat.numel() - flat.numel() % locals_
            if whole < flat.numel():
                self._pipeline([flat[whole:]], self._by_leaders, op, end)
                flat = flat[:whole]
            steps = self._by_rails
        self._pipeline(torch.split(flat, each), steps, op, end)

    def _pipeline(
        self,
        pieces: Sequence[Tensor],
        steps: Callable[[Tensor, ReduceOp, float], Callable[[], None]],
        op: ReduceOp,
        end: float,
    ) -> None:
        """Begin each piece, and end the oldest once enough are under way; the same everywhere."""
        ends: deque[Callable[[], None]] = deque()
        for piece in pieces:
            ends.append(steps(piece, op, end))
            if len(ends) >= _IN_FLIGHT:
                ends.popleft()()
        while ends:
            ends.popleft()()

    def _by_leaders(self, x: Tensor, op: ReduceOp, end: float) -> Callable[[], None]:
        """Reduce to the leader, all_reduce among leaders, broadcast."""
        intra = self._intra
        if intra is not None:
            intra.reduce(x, 0, op)
        land = None if self._leaders is None else self._leaders.start(x, op, end)

        def rest() -> None:
            if land is not None:
                land()
            if intra is not None:
                intra.broadcast(x, 0)

        return rest

    def _by_rails(self, x: Tensor, op: ReduceOp, end: float) -> Callable[[], None]:
        """Reduce_scatter on the host, all_reduce of each part along its rail, all_gather."""
        intra, rail = self._intra, self._rail
        assert intra is not None
        assert rail is not None
        part = torch.empty(x.numel() // intra.size, dtype=x.dtype)
        intra.reduce_scatter_tensor(part, x, op)
        land = rail.start(part, op, end)

        def rest() -> None:
            land()
            intra.all_gather_into_tensor(x, part)

        return rest

    # -- the others -------------------------------------------------------------------------

    def _broadcast(self, x: Tensor, src: int, end: float) -> None:
        home, place = self._map.host_of(src)
        here = self._map.index == home
        if here and self._intra is not None:
            self._intra.broadcast(x, place)
        if self._leaders is not None:
            finish(self._leaders.group.broadcast(x, home, async_op=True), end)
        if not here and self._intra is not None:
            self._intra.broadcast(x, 0)

    def _reduce(self, x: Tensor, dst: int, op: ReduceOp, end: float) -> None:
        home, place = self._map.host_of(dst)
        if self._intra is not None:
            self._intra.reduce(x, 0, op)
        if self._leaders is not None:
            finish(self._leaders.group.reduce(x, home, op, async_op=True), end)
        if self._map.index == home and place != 0 and self._intra is not None:
            self._intra.broadcast(x, 0)

    def _all_gather(self, out: Tensor, x: Tensor, end: float) -> None:
        """Each host's rows meet at its leader; leaders exchange; each host spreads all rows."""
        size, n = self._map.size, x.numel()
        rows = out.view(size, n) if self._map.in_order else torch.empty(size, n, dtype=x.dtype)
        counts = [len(host) for host in self._map.hosts]
        parts = torch.split(rows, counts)
        mine = parts[self._map.index]
        if self._intra is not None:
            self._intra.all_gather_into_tensor(mine, x.view(-1))
        else:
            mine.copy_(x.view(1, n))
        if self._leaders is not None:
            group = self._leaders.group
            works = [group.broadcast(part, h, async_op=True) for h, part in enumerate(parts)]
            for work in works:
                finish(work, end)
        if self._intra is not None:
            self._intra.broadcast(rows, 0)
        if not self._map.in_order:
            out.view(size, n)[self._order] = rows

    def _reduce_scatter(self, out: Tensor, x: Tensor, op: ReduceOp, end: float) -> None:
        """The host's sums meet at its leader; leaders exchange what belongs to each other."""
        size, n = self._map.size, out.numel()
        rows = x.view(size, n)
        # A copy in either case: the input is the caller's.
        rows = rows.clone() if self._map.in_order else rows[self._order]
        if self._intra is not None:
            self._intra.reduce(rows, 0, op)
        counts = [len(host) for host in self._map.hosts]
        mine = torch.split(rows, counts)[self._map.index].clone()
        if self._leaders is not None:
            group = self._leaders.group
            here = len(self._map.mine)
            theirs = torch.empty((len(counts) * here, n), dtype=x.dtype)
            work = group.all_to_all_single(
                theirs, rows, [here] * len(counts), counts, async_op=True
            )
            finish(work, end)
            Fold(op).over(mine, theirs.view(len(counts), here, n).unbind(0))
        if self._intra is not None:
            parts = list(mine.unbind(0)) if self._map.leads else None
            self._intra.scatter(out.view(-1), parts, 0)
        else:
            out.view(-1).copy_(mine.view(-1))

    def _barrier(self, end: float) -> None:
        if self._intra is not None:
            self._intra.barrier()
        if self._leaders is not None:
            self._leaders.group.barrier(max(0.001, end - time.monotonic()))
        if self._intra is not None:
            self._intra.barrier()
