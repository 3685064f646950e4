"""The shortest way through a small call: one step, with every view and number bound before.

What `Flags.open`, `begin`, `publish` and `wait` do stands here in line, for tensors that fit into
one slot; CPython's attribute lookups would cost more than the call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch

from sagellm.core.protocols.process_group import RawCall

from .layout import SIGNATURE, SYMMETRIC
from .python_arithmetic import NUMPY_TYPES, Array, Fold
from .python_flags import POISON, Flags, clock
from .python_memory import Memory
from .python_plans import packed
from .python_records import FULL, Records, tag_of

__all__ = ["OneStep", "one_step"]

OneStep: TypeAlias = Callable[[Array, Array], None]
"""`step(x, out)` on flat arrays: of `typed` for reductions, of `moved` for others."""

Give: TypeAlias = Callable[[Array], object]
"""Write this rank's slot of one parity."""

Take: TypeAlias = Callable[[int, Array, Array], None]
"""`take(parity, x, out)`: read the peers' slots."""


def one_step(
    call: RawCall,
    dtype: torch.dtype,
    nbytes: int,
    flags: Flags,
    memory: Memory,
    records: Records | None,
    fold: Fold | None,
    *,
    slot_bytes: int,
) -> OneStep | None:
    """A function that makes `call` of `nbytes` in one step, or None where it takes more.

    Args:
        call: all_reduce, all_gather, reduce_scatter or broadcast; its tensors are not looked at.
        dtype: Of the elements.
        nbytes: Of this rank's input.
        flags: Those of the engine.
        memory: Where slots are.
        records: None without statistics.
        fold: Combines elements, for reductions.
        slot_bytes: Size of a slot.

    """
    world = len(flags.peers) + 1
    if nbytes > (memory.part_bytes * world if call.op == "reduce_scatter" else slot_bytes):
        return None
    count = nbytes // dtype.itemsize
    if fold is None and dtype not in NUMPY_TYPES:
        dtype_moved = torch.int16
    else:
        dtype_moved = dtype
    if call.op == "reduce_scatter":
        assert fold is not None
        give, take = _scattering(count // world, dtype, flags.rank, flags.peers, memory, fold)
    else:
        views = memory.views(count, dtype_moved, 0)
        give = (_put(views[0][flags.rank]), _put(views[1][flags.rank]))
        if call.op == "all_reduce":
            assert fold is not None
            take = _reducing(views, flags.rank, fold)
        elif call.op == "all_gather":
            take = _gathering(views, count, flags.rank)
        else:
            assert call.peer is not None
            take = _casting(views, call.peer)
            if call.peer == flags.rank:
                take = _nothing
            else:
                give = (_none, _none)
    algorithm = "one_shot" if call.op == "all_reduce" else "direct"
    word, timeout_ns = packed(call, 0, dtype), int(call.timeout_s * 1e9)
    return _step(word, nbytes, timeout_ns, flags, give, take, records, tag_of(word, algorithm))


Pair: TypeAlias = tuple[Give, Give]
Views: TypeAlias = tuple[tuple[Array, ...], tuple[Array, ...]]


def _put(view: Array) -> Give:
    """A function that copies an array to `view`, without a frame of the interpreter."""
    put: Give = view.copy_ if isinstance(view, torch.Tensor) else partial(view.__setitem__, ...)
    return put


def _none(x: Array) -> None:
    """Write nothing."""


def _nothing(parity: int, x: Array, out: Array) -> None:
    """Read nothing."""


def _reducing(views: Views, me: int, fold: Fold) -> Take:
    operands = [list(v) for v in views]

    def take(parity: int, x: Array, out: Array) -> None:
        xs = operands[parity]
        xs[me] = x
        fold(xs, out)
        xs[me] = None  # the tensor is not ours to keep

    return take


def _gathering(views: Views, n: int, me: int) -> Take:
    ranges = tuple(slice(p * n, p * n + n) for p in range(len(views[0])))

    def take(parity: int, x: Array, out: Array) -> None:
        for part, slot in zip(ranges, views[parity], strict=True):
            out[part] = slot

    return take


def _casting(views: Views, root: int) -> Take:
    def take(parity: int, x: Array, out: Array) -> None:
        out[...] = views[parity][root]

    return take


def _scattering(
    n: int, dtype: torch.dtype, me: int, peers: tuple[int, ...], memory: Memory, fold: Fold
) -> tuple[Pair, Take]:
    """`n` elements for each rank."""
    step = memory.part_bytes
    parts: list[list[tuple[Give, slice]]] = [[], []]
    for p in peers:
        slots = memory.views(n, dtype, p * step)
        for parity in (0, 1):
            parts[parity].append((_put(slots[parity][me]), slice(p * n, p * n + n)))
    views = memory.views(n, dtype, me * step)
    fold_own = _reducing(views, me, fold)
    own = slice(me * n, me * n + n)

    def give(puts: list[tuple[Give, slice]], x: Array) -> None:
        for put, part in puts:
            put(x[part])

    def take(parity: int, x: Array, out: Array) -> None:
        fold_own(parity, x[own], out)

    return (partial(give, parts[0]), partial(give, parts[1])), take


def _step(
    word: int,
    nbytes: int,
    timeout_ns: int,
    flags: Flags,
    give: Pair,
    take: Take,
    records: Records | None,
    tag: int,
) -> OneStep:
    """`give`, publish, wait for all, compare, `take`: one whole call."""
    words, mine, theirs = flags.words, flags.mine, flags.theirs
    own = flags.control[flags.rank]
    signatures = tuple(own + SIGNATURE[parity] for parity in (0, 1))
    offsets = tuple(own + SYMMETRIC[parity] for parity in (0, 1))
    peers = tuple(
        tuple((p, flags.control[p] + SIGNATURE[parity]) for p in flags.peers) for parity in (0, 1)
    )
    check_poison, wait_for = flags.check_poison, flags.wait_for
    now, begun = clock, (word, nbytes)
    rows = [] if records is None else records.rows
    remember = rows.append

    def run(x: Array, out: Array) -> None:
        try:
            poisoned = words[POISON]
        except ValueError:  # the words were released by `close`
            poisoned = 1
        if poisoned:
            check_poison()
        started = waited = 0
        if records is not None:
            waited = flags.wait_ns
            started = now()
            records.running = begun, started
        flags.timeout_ns, flags.deadline_ns = timeout_ns, 0
        step = flags.step
        for at in theirs:
            if words[at] < step:
                wait_for(at, step)
        flags.step = step = step + 1
        parity = step & 1
        give[parity](x)
        at = signatures[parity]
        words[at] = word
        words[at + 1] = nbytes
        words[at + 2] = flags.calls
        words[offsets[parity]] = 0
        words[mine] = step
        for at in theirs:
            if words[at] < step:
                wait_for(at, step)
        for peer, at in peers[parity]:
            if words[at] != word or words[at + 1] != nbytes:
                raise flags.mismatch(peer)
        take(parity, x, out)
        flags.calls += 1
        if records is not None:
            remember((tag, nbytes, started, now(), flags.wait_ns - waited))
            records.running = None
            if len(rows) >= FULL:
                records.count()

    return run
