"""The steps of every operation: what is written, awaited and read in which step.

Letters: W ranks, n bytes, m bytes of a part. Where ranks take shares, a slot is cut into W parts;
part p of rank r's slot is what r gives to p. Offsets and lengths are bytes; `share` clips them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sagellm.core.protocols.process_group import RawCall

from .layout import DTYPES, OPS, REDUCTIONS, pack
from .python_arithmetic import Array, Fold, typed
from .python_flags import Flags
from .python_memory import Memory, move

__all__ = ["Plans"]

REDUCTION_BLOCK_BYTES = 256 * 1024


def share(n: int, low: int, length: int) -> int:
    """How many of `length` bytes from `low` on are within `n`."""
    return max(0, min(length, n - low))


class Plans:
    """Runs steps on slots; the caller has opened the call, so that its first step is checked."""

    def __init__(self, flags: Flags, memory: Memory, rank: int, world: int, slot: int) -> None:
        self.flags, self.memory = flags, memory
        self.rank, self.world, self.slot = rank, world, slot
        self.peers = flags.peers

    # -- no data --------------------------------------------------------------------------

    def barrier(self) -> None:
        """One step without data."""
        flags = self.flags
        flags.begin()
        flags.publish()
        flags.wait()

    # -- reductions -----------------------------------------------------------------------

    def one_shot(self, x: Tensor, fold: Fold) -> bool:
        """Per chunk: everybody writes all of it, everybody adds all of it.

        Returns:
            Whether it ran; False, after one step, if peers' tensors are symmetric.

        """
        flags, me = self.flags, self.rank
        size, address, dtype = x.itemsize, x.data_ptr(), x.dtype
        elements = typed(x)
        n = x.nbytes
        for low in range(0, n or 1, self.slot):
            m = share(n, low, self.slot)
            parity = flags.begin() & 1
            move(self.memory.slots[parity][me], address + low, m)
            flags.publish()
            flags.wait()
            if not low and flags.offered():
                return False
            operands = list(self.memory.views(m // size, dtype, 0)[parity])
            out = elements if m == n else elements[low // size : (low + m) // size]
            operands[me] = out
            fold(operands, out)
        return True

    def two_shot(self, x: Tensor, fold: Fold) -> bool:
        """Chunk by chunk, every rank adds its share, then takes the others'.

        Step c gives away the parts of chunk c, and the finished share of chunk c - 1 where the
        part for oneself would be: one synchronisation per chunk, and one more.

        Returns:
            As `one_shot`.

        """
        flags, me, slots = self.flags, self.rank, self.memory.slots
        size, address, dtype, n = x.itemsize, x.data_ptr(), x.dtype, x.nbytes
        elements = typed(x)
        m = self.memory.part(n)
        chunk = m * self.world
        chunks = max(1, -(-n // chunk))
        for c in range(chunks + 1):
            parity = flags.begin() & 1
            own = slots[parity][me]
            if c < chunks:
                for p in self.peers:
                    low = c * chunk + p * m
                    move(own + p * m, address + low, share(n, low, m))
            low = (c - 1) * chunk + me * m
            length = share(n, low, m)
            if c and length:
                operands = list(self.memory.views(length // size, dtype, me * m)[1 - parity])
                out = operands[me] = elements[low // size : (low + length) // size]
                fold(operands, out)
                move(own + me * m, address + low, length)
            flags.publish()
            flags.wait()
            if c:
                for p in self.peers:
                    low = (c - 1) * chunk + p * m
                    move(address + low, slots[parity][p] + p * m, share(n, low, m))
            elif flags.offered():
                return False
        return True

    def symmetric(self, x: Tensor, fold: Fold) -> bool:
        """Every rank adds its share where it lies in all arenas, and writes it to all.

        Returns:
            Whether it ran; False, after one step, if a peer's tensor is elsewhere.

        """
        flags, me = self.flags, self.rank
        self.barrier()
        if not flags.all_symmetric:
            flags.offered()
            return False
        n, size, dtype = x.nbytes, x.itemsize, x.dtype
        mine = typed(x)
        offsets = {p: flags.offset(p) for p in self.peers}
        count = n // size
        tensors: list[Array] = [
            mine if r == me else self.memory.in_arena(r, offsets[r], count, dtype)
            for r in range(self.world)
        ]
        m = -(-n // self.world) + 63 & -64
        end = min(n, (me + 1) * m)
        for low in range(me * m, end, REDUCTION_BLOCK_BYTES):
            high = min(end, low + REDUCTION_BLOCK_BYTES)
            block = slice(low // size, high // size)
            fold([t[block] for t in tensors], mine[block])
            for p in self.peers:
                move(
                    self.memory.arenas[p] + offsets[p] + low,
                    x.data_ptr() + low,
                    high - low,
                )
        self.barrier()
        return True

    def reduce_scatter(self, out: Tensor, x: Tensor, fold: Fold) -> None:
        """Per chunk: everybody gives each rank its part, and adds those it is given."""
        flags, me, slots = self.flags, self.rank, self.memory.slots
        size, address, dtype, n = x.itemsize, x.data_ptr(), x.dtype, out.nbytes
        source, target = typed(x), typed(out)
        step = self.memory.part_bytes
        for low in range(0, n or 1, step):
            m = share(n, low, step)
            parity = flags.begin() & 1
            own = slots[parity][me]
            for p in self.peers:
                move(own + p * step, address + p * n + low, m)
            flags.publish()
            flags.wait()
            operands = list(self.memory.views(m // size, dtype, me * step)[parity])
            at = (me * n + low) // size
            operands[me] = source[at : at + m // size]
            fold(operands, target[low // size : (low + m) // size])

    def reduce(self, x: Tensor, fold: Fold, root: int) -> None:
        """Per chunk: everybody writes all of it, the root adds."""
        flags, me = self.flags, self.rank
        size, address, dtype, n = x.itemsize, x.data_ptr(), x.dtype, x.nbytes
        elements = typed(x)
        for low in range(0, n or 1, self.slot):
            m = share(n, low, self.slot)
            parity = flags.begin() & 1
            if me != root:
                move(self.memory.slots[parity][me], address + low, m)
            flags.publish()
            if me == root or not low:
                flags.wait()
            if me == root:
                operands = list(self.memory.views(m // size, dtype, 0)[parity])
                out = operands[me] = elements[low // size : (low + m) // size]
                fold(operands, out)

    # -- moves ----------------------------------------------------------------------------

    def all_gather(self, out: int, x: int, n: int) -> None:
        """Per chunk: everybody writes its own and reads all others'."""
        flags, me, slots = self.flags, self.rank, self.memory.slots
        for low in range(0, n or 1, self.slot):
            m = share(n, low, self.slot)
            parity = flags.begin() & 1
            move(slots[parity][me], x + low, m)
            flags.publish()
            if out + me * n != x:
                move(out + me * n + low, x + low, m)
            flags.wait()
            for p in self.peers:
                move(out + p * n + low, slots[parity][p], m)

    def broadcast(self, x: int, n: int, root: int) -> None:
        """Per chunk: the root writes, the others read; the root is at most a chunk ahead."""
        flags, me, slots = self.flags, self.rank, self.memory.slots
        for low in range(0, n or 1, self.slot):
            m = share(n, low, self.slot)
            parity = flags.begin() & 1
            if me == root:
                move(slots[parity][me], x + low, m)
            flags.publish()
            if me != root:
                flags.wait(root)
                move(x + low, slots[parity][root], m)
            elif not low:
                flags.wait()

    def gather(self, outs: Sequence[int], x: int, n: int, root: int) -> None:
        """Per chunk: the others write, the root reads; `outs` is empty elsewhere."""
        flags, me, slots = self.flags, self.rank, self.memory.slots
        for low in range(0, n or 1, self.slot):
            m = share(n, low, self.slot)
            parity = flags.begin() & 1
            if me != root:
                move(slots[parity][me], x + low, m)
            flags.publish()
            if me == root or not low:
                flags.wait()
            if me == root:
                for p, out in enumerate(outs):
                    move(out + low, x + low if p == me else slots[parity][p], m)

    def scatter(self, out: int, xs: Sequence[int], n: int, root: int) -> None:
        """Per chunk: the root writes each rank's part, which that rank reads."""
        flags, me, slots = self.flags, self.rank, self.memory.slots
        step = self.memory.part_bytes
        for low in range(0, n or 1, step):
            m = share(n, low, step)
            parity = flags.begin() & 1
            if me == root:
                for p, x in enumerate(xs):
                    move(out + low if p == me else slots[parity][me] + p * step, x + low, m)
            flags.publish()
            if me != root:
                flags.wait(root)
                move(out + low, slots[parity][root] + me * step, m)
            elif not low:
                flags.wait()

    def all_to_all(self, out: int, x: int, gives: Sequence[int], takes: Sequence[int]) -> None:
        """Give `gives[p]` bytes to each p and take `takes[p]`, where all are equal."""
        self.exchange(out, x, gives, takes, max(gives))

    def all_to_all_uneven(
        self, out: int, x: int, gives: Sequence[int], takes: Sequence[int]
    ) -> None:
        """As `all_to_all`, after a step in which all ranks tell and compare all lengths."""
        flags, world = self.flags, self.world
        parity = flags.begin() & 1
        tables = self.memory.views(2 * world, torch.int64, 0)[parity]
        tables[self.rank][:] = [*gives, *takes]
        flags.publish()
        flags.wait()
        lengths = [table.tolist() for table in tables]
        for r in range(world):
            for p in range(world):
                if lengths[r][p] != lengths[p][world + r]:
                    raise flags.mismatch(r if r != self.rank else p)
        longest = max(lengths[r][p] for r in range(world) for p in range(world) if p != r)
        self.exchange(out, x, gives, takes, longest)

    def exchange(
        self, out: int, x: int, gives: Sequence[int], takes: Sequence[int], longest: int
    ) -> None:
        """Per chunk: everybody writes the next piece for each rank, and reads its own pieces.

        `longest` is the longest piece of any rank for any other: all take as many steps.
        """
        flags, me, slots = self.flags, self.rank, self.memory.slots
        sources = [x + sum(gives[:p]) for p in range(self.world)]
        targets = [out + sum(takes[:p]) for p in range(self.world)]
        move(targets[me], sources[me], gives[me])
        step = self.memory.part_bytes
        for low in range(0, longest or 1, step):
            parity = flags.begin() & 1
            own = slots[parity][me]
            for p in self.peers:
                move(own + p * step, sources[p] + low, share(gives[p], low, step))
            flags.publish()
            flags.wait()
            for p in self.peers:
                move(
                    targets[p] + low,
                    slots[parity][p] + me * step,
                    share(takes[p], low, step),
                )


_OPS = {name: i for i, name in enumerate(OPS)}
_DTYPES = {getattr(torch, name): i for i, name in enumerate(DTYPES)}
_REDUCTIONS = {name: i for i, name in enumerate(REDUCTIONS)}


def packed(call: RawCall, flags: int, dtype: torch.dtype | None = None) -> int:
    """The first signature word of a call; its tensors tell the type unless it is given."""
    tensors = call.outputs or call.inputs
    if dtype is None and tensors:
        dtype = tensors[0].dtype
    return pack(
        _OPS[call.op],
        -1 if dtype is None else _DTYPES.get(dtype, -1),
        _REDUCTIONS[call.reduce_op] if call.reduce_op else 0,
        flags,
        -1 if call.peer is None else call.peer,
    )
