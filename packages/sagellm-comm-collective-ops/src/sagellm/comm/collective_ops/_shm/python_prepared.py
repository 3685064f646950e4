"""The shortest way through a small call: one step, with every view and number bound before.

What `Flags.open`, `begin`, `publish` and `wait` do stands here in line, for tensors that fit into
one slot; CPython's attribute lookups would cost more than the call.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sagellm.core.protocols.process_group import RawCall

from .choice import ALGORITHMS
from .layout import SIGNATURE, SYMMETRIC
from .python_arithmetic import Array, Fold, typed
from .python_flags import POISON, Flags, clock
from .python_memory import Memory
from .python_records import Records

__all__ = ["prepare_small"]


def as_bytes(x: Tensor) -> Array:
    """The bytes of a contiguous tensor, as a flat numpy array that shares its memory."""
    return x.detach().as_strided((x.numel(),), (1,)).view(torch.uint8).numpy()


def prepare_small(
    call: RawCall,
    word: int,
    flags: Flags,
    memory: Memory,
    records: Records | None,
    fold: Fold | None,
    *,
    one_shot: bool,
    slot_bytes: int,
) -> Callable[[], None] | None:
    """A function that makes `call` in one step, or None where it takes more than one."""
    x = call.inputs[0] if call.inputs else call.outputs[0]
    if call.op == "reduce_scatter":
        fits = call.outputs[0].nbytes <= memory.part_bytes
    else:
        fits = one_shot and x.nbytes <= slot_bytes
    if not fits or not x.nbytes:
        return None
    if call.op == "all_gather":
        give, take = _gathering(call, flags, memory)
    elif call.op == "reduce_scatter":
        assert fold is not None
        give, take = _scattering(call, flags, memory, fold)
    else:
        assert fold is not None
        give, take = _reducing(call, flags, memory, fold)
    step = _one_step(word, x.nbytes, int(call.timeout_s * 1e9), flags, give, take)
    if records is None:
        return step
    algorithm = ALGORITHMS.index("one_shot" if call.op == "all_reduce" else "direct")
    return _recorded(step, word, x.nbytes, algorithm, flags, records)


Half = Callable[[int], None]
"""Half of a step's data movement, given the parity."""


def _reducing(call: RawCall, flags: Flags, memory: Memory, fold: Fold) -> tuple[Half, Half]:
    x, me = call.outputs[0], flags.rank
    elements, source = typed(x), as_bytes(x)
    slots = tuple(v[me] for v in memory.views(x.nbytes, torch.uint8, 0))
    operands = [list(v) for v in memory.views(x.numel(), x.dtype, 0)]
    for views in operands:
        views[me] = elements

    def give(parity: int) -> None:
        slots[parity][...] = source

    def take(parity: int) -> None:
        fold(operands[parity], elements)

    return give, take


def _gathering(call: RawCall, flags: Flags, memory: Memory) -> tuple[Half, Half]:
    x, n, me = call.inputs[0], call.inputs[0].nbytes, flags.rank
    source, target = as_bytes(x), as_bytes(call.outputs[0])
    views = memory.views(n, torch.uint8, 0)
    own = target[me * n : me * n + n]
    in_place = own.ctypes.data == source.ctypes.data
    pairs = tuple(
        tuple((target[p * n : p * n + n], views[parity][p]) for p in flags.peers)
        for parity in (0, 1)
    )

    def give(parity: int) -> None:
        views[parity][me][...] = source

    def take(parity: int) -> None:
        if not in_place:
            own[...] = source
        for to, slot in pairs[parity]:
            to[...] = slot

    return give, take


def _scattering(call: RawCall, flags: Flags, memory: Memory, fold: Fold) -> tuple[Half, Half]:
    x, out, me = call.inputs[0], call.outputs[0], flags.rank
    n, count, source, target = out.nbytes, out.numel(), as_bytes(x), typed(out)
    step = memory.part_bytes
    pairs: list[list[tuple[np.ndarray, np.ndarray]]] = [[], []]
    for p in flags.peers:
        slots = memory.views(n, torch.uint8, p * step)
        for parity in (0, 1):
            pairs[parity].append((slots[parity][me], source[p * n : p * n + n]))
    operands = [list(v) for v in memory.views(count, x.dtype, me * step)]
    for views in operands:
        views[me] = typed(x)[me * count : me * count + count]

    def give(parity: int) -> None:
        for slot, part in pairs[parity]:
            slot[...] = part

    def take(parity: int) -> None:
        fold(operands[parity], target)

    return give, take


def _one_step(
    word: int, nbytes: int, timeout_ns: int, flags: Flags, give: Half, take: Half
) -> Callable[[], None]:
    """`give`, publish, wait for all, compare, `take`: one whole call."""
    words, mine, theirs = flags.words, flags.mine, flags.theirs
    own = flags.control[flags.rank]
    signatures = tuple(own + SIGNATURE[parity] for parity in (0, 1))
    offsets = tuple(own + SYMMETRIC[parity] for parity in (0, 1))
    peers = tuple(
        tuple((p, flags.control[p] + SIGNATURE[parity]) for p in flags.peers) for parity in (0, 1)
    )
    check_poison, wait_for = flags.check_poison, flags.wait_for

    def run() -> None:
        try:
            poisoned = words[POISON]
        except ValueError:  # the words were released by `close`
            poisoned = 1
        if poisoned:
            check_poison()
        flags.timeout_ns, flags.deadline_ns = timeout_ns, 0
        step = flags.step
        for at in theirs:
            if words[at] < step:
                wait_for(at, step)
        flags.step = step = step + 1
        parity = step & 1
        give(parity)
        at = signatures[parity]
        words[at] = word
        words[at + 1] = nbytes
        words[at + 2] = flags.calls
        flags.calls += 1
        words[offsets[parity]] = 0
        words[mine] = step
        for at in theirs:
            if words[at] < step:
                wait_for(at, step)
        for peer, at in peers[parity]:
            if words[at] != word or words[at + 1] != nbytes:
                raise flags.mismatch(peer)
        take(parity)

    return run


def _recorded(
    step: Callable[[], None],
    word: int,
    nbytes: int,
    algorithm: int,
    flags: Flags,
    records: Records,
) -> Callable[[], None]:
    write = records.write

    def run() -> None:
        started, waited = clock(), flags.wait_ns
        records.running = (word, nbytes, started)
        step()
        write(word, nbytes, started, clock(), flags.wait_ns - waited, algorithm)

    return run
