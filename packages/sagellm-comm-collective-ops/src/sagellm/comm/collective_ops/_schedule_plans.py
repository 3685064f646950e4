"""The schedules of each operation. Every builder takes any number of ranks. No torch here.

n = ranks, p = the largest power of two in n. Ranks p to n-1 hand their part to the rank p
below them at the start, and are handed the result at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ._schedule_data import Move, Schedule, Step, ranges

__all__ = ["PLANS"]

Plan = Callable[[int, int, Sequence[int]], Schedule]
"""Makes a schedule of `size` ranks with a root, in an order of the ranks."""


class _Draft:
    """Steps of every rank while they are written down."""

    def __init__(self, size: int) -> None:
        self.steps: list[list[list[Move]]] = [[] for _ in range(size)]

    def step(self) -> None:
        """Let every rank begin a step."""
        for steps in self.steps:
            steps.append([])

    def message(self, src: int, dst: int, chunks: Iterable[int], *, reduce: bool = False) -> None:
        """Send chunks from one rank to another in the step that both are at."""
        for start, stop in ranges(chunks):
            self.steps[src][-1].append(Move("send", dst, start, stop))
            self.steps[dst][-1].append(Move("recv", src, start, stop, reduce))

    def done(self, op: str, algorithm: str, chunks: int, root: int = 0) -> Schedule:
        """The schedule; a rank that has nothing to do in a step does not have the step."""
        steps: tuple[tuple[Step, ...], ...] = tuple(
            tuple(tuple(step) for step in steps if step) for steps in self.steps
        )
        return Schedule(op, algorithm, len(steps), chunks, steps, root)


# -- ring: n chunks; each step every rank sends one to the next and gets one from the one before --


def _ring_reduce_scatter(size: int, root: int, order: Sequence[int]) -> Schedule:
    draft = _Draft(size)
    for k in range(1, size):
        draft.step()
        for at in range(size):
            draft.message(order[at], order[(at + 1) % size], [order[(at - k) % size]], reduce=True)
    return draft.done("reduce_scatter", "ring", size)


def _ring_all_gather(size: int, root: int, order: Sequence[int]) -> Schedule:
    draft = _Draft(size)
    for k in range(size - 1):
        draft.step()
        for at in range(size):
            draft.message(order[at], order[(at + 1) % size], [order[(at - k) % size]])
    return draft.done("all_gather", "ring", size)


def _ring_all_reduce(size: int, root: int, order: Sequence[int]) -> Schedule:
    first, second = _ring_reduce_scatter(size, 0, order), _ring_all_gather(size, 0, order)
    return first.then(second, "all_reduce", "ring")


def _chain(size: int, root: int, order: Sequence[int], op: str) -> Schedule:
    """A pipeline of n chunks along the ring, from the root or towards it."""
    start = order.index(root)
    line = [order[(start + i) % size] for i in range(size)]
    if op == "reduce":
        line.reverse()
    draft = _Draft(size)
    for k in range(2 * size - 2):
        draft.step()
        for at in range(size - 1):
            if 0 <= k - at < size:
                draft.message(line[at], line[at + 1], [k - at], reduce=op == "reduce")
    return draft.done(op, "ring", size, root)


def _ring_broadcast(size: int, root: int, order: Sequence[int]) -> Schedule:
    return _chain(size, root, order, "broadcast")


def _ring_reduce(size: int, root: int, order: Sequence[int]) -> Schedule:
    return _chain(size, root, order, "reduce")


# -- binomial tree: log2(n) steps with the whole buffer, up, down or both --------------------------


def _edges(size: int, root: int) -> list[list[tuple[int, int]]]:
    """(parent, child) by level, from the root down."""
    levels = []
    distance = 1 << max(0, size - 1).bit_length()
    while distance > 1:
        half = distance >> 1
        pairs = range(0, size - half, distance)
        levels.append([((at + root) % size, (at + half + root) % size) for at in pairs])
        distance = half
    return levels


def _tree_broadcast(size: int, root: int, order: Sequence[int]) -> Schedule:
    draft = _Draft(size)
    for level in _edges(size, root):
        draft.step()
        for parent, child in level:
            draft.message(parent, child, [0])
    return draft.done("broadcast", "tree", 1, root)


def _tree_reduce(size: int, root: int, order: Sequence[int]) -> Schedule:
    draft = _Draft(size)
    for level in reversed(_edges(size, root)):
        draft.step()
        for parent, child in level:
            draft.message(child, parent, [0], reduce=True)
    return draft.done("reduce", "tree", 1, root)


def _tree_all_reduce(size: int, root: int, order: Sequence[int]) -> Schedule:
    up, down = _tree_reduce(size, 0, order), _tree_broadcast(size, 0, order)
    return up.then(down, "all_reduce", "tree")


# -- powers of two ---------------------------------------------------------------------------------


def _power(size: int) -> int:
    return 1 << (size.bit_length() - 1)


def _fold(draft: _Draft, size: int, chunks: int) -> None:
    p = _power(size)
    draft.step()
    for extra in range(p, size):
        draft.message(extra, extra - p, range(chunks), reduce=True)


def _unfold(draft: _Draft, size: int, chunks: int) -> None:
    p = _power(size)
    draft.step()
    for extra in range(p, size):
        draft.message(extra - p, extra, range(chunks))


def _block(first: int, count: int, p: int, chunks: int) -> list[int]:
    """Chunks of `count` ranks below p, and of the ranks p above them where these have chunks."""
    own = range(first, first + count)
    return [c for c in (*own, *(r + p for r in own)) if c < chunks]


def _halve(draft: _Draft, size: int, chunks: int) -> None:
    p = _power(size)
    half = p >> 1
    while half:
        draft.step()
        for rank in range(p):
            theirs = ((rank ^ half) // half) * half
            draft.message(rank, rank ^ half, _block(theirs, half, p, chunks), reduce=True)
        half >>= 1


def _double(draft: _Draft, size: int, chunks: int) -> None:
    p = _power(size)
    have = 1
    while have < p:
        draft.step()
        for rank in range(p):
            draft.message(rank, rank ^ have, _block((rank // have) * have, have, p, chunks))
        have <<= 1


def _doubling_all_reduce(size: int, root: int, order: Sequence[int]) -> Schedule:
    draft = _Draft(size)
    _fold(draft, size, 1)
    distance = 1
    while distance < _power(size):
        draft.step()
        for rank in range(_power(size)):
            draft.message(rank, rank ^ distance, [0], reduce=True)
        distance <<= 1
    _unfold(draft, size, 1)
    return draft.done("all_reduce", "recursive_doubling", 1)


def _halving_doubling_all_reduce(size: int, root: int, order: Sequence[int]) -> Schedule:
    draft, chunks = _Draft(size), _power(size)
    _fold(draft, size, chunks)
    _halve(draft, size, chunks)
    _double(draft, size, chunks)
    _unfold(draft, size, chunks)
    return draft.done("all_reduce", "halving_doubling", chunks)


def _halving_reduce_scatter(size: int, root: int, order: Sequence[int]) -> Schedule:
    draft, p = _Draft(size), _power(size)
    _fold(draft, size, size)
    _halve(draft, size, size)
    draft.step()
    for extra in range(p, size):
        draft.message(extra - p, extra, [extra])
    return draft.done("reduce_scatter", "halving_doubling", size)


def _doubling_all_gather(size: int, root: int, order: Sequence[int]) -> Schedule:
    draft, p = _Draft(size), _power(size)
    draft.step()
    for extra in range(p, size):
        draft.message(extra, extra - p, [extra])
    _double(draft, size, size)
    draft.step()
    for extra in range(p, size):
        # All but its own, which it holds already.
        draft.message(extra - p, extra, [c for c in range(size) if c != extra])
    return draft.done("all_gather", "recursive_doubling", size)


# -- direct: everyone to everyone at once ----------------------------------------------------------


def _pairs(size: int) -> list[tuple[int, int]]:
    """All (src, dst), so that at each moment no rank is everybody's first receiver."""
    return [(src, (src + k) % size) for k in range(1, size) for src in range(size)]


def _direct_all_reduce(size: int, root: int, order: Sequence[int]) -> Schedule:
    draft = _Draft(size)
    draft.step()
    for src, dst in _pairs(size):
        draft.message(src, dst, [0], reduce=True)
    return draft.done("all_reduce", "direct", 1)


def _direct_reduce_scatter(size: int, root: int, order: Sequence[int]) -> Schedule:
    draft = _Draft(size)
    draft.step()
    for src, dst in _pairs(size):
        draft.message(src, dst, [dst], reduce=True)
    return draft.done("reduce_scatter", "direct", size)


def _direct_all_gather(size: int, root: int, order: Sequence[int]) -> Schedule:
    draft = _Draft(size)
    draft.step()
    for src, dst in _pairs(size):
        draft.message(src, dst, [src])
    return draft.done("all_gather", "direct", size)


def _two_shot_all_reduce(size: int, root: int, order: Sequence[int]) -> Schedule:
    first, second = _direct_reduce_scatter(size, 0, order), _direct_all_gather(size, 0, order)
    return first.then(second, "all_reduce", "two_shot")


def _direct_broadcast(size: int, root: int, order: Sequence[int]) -> Schedule:
    draft = _Draft(size)
    draft.step()
    for k in range(1, size):
        draft.message(root, (root + k) % size, [0])
    return draft.done("broadcast", "direct", 1, root)


def _direct_reduce(size: int, root: int, order: Sequence[int]) -> Schedule:
    draft = _Draft(size)
    draft.step()
    for k in range(1, size):
        draft.message((root + k) % size, root, [0], reduce=True)
    return draft.done("reduce", "direct", 1, root)


def _exchange(draft: _Draft, a: int, b: int) -> None:
    # Each sends the chunk for the other, and puts the other's for it in the same place.
    for src, dst in ((a, b), (b, a)):
        draft.steps[src][-1].append(Move("send", dst, dst, dst + 1))
        draft.steps[dst][-1].append(Move("recv", src, src, src + 1))


def _direct_all_to_all(size: int, root: int, order: Sequence[int]) -> Schedule:
    draft = _Draft(size)
    draft.step()
    for a in range(size):
        for b in range(a + 1, size):
            _exchange(draft, a, b)
    return draft.done("all_to_all", "direct", size)


def _pairwise_all_to_all(size: int, root: int, order: Sequence[int]) -> Schedule:
    """Rounds of a tournament: n-1 for an even number of ranks, n (one rests) for an odd one."""
    draft = _Draft(size)
    turn = size - 1 if size % 2 == 0 else size
    for k in range(turn if size > 1 else 0):
        draft.step()
        for a in range(turn):
            b = (k - a) % turn
            if a < b:
                _exchange(draft, a, b)
            elif a == b and size % 2 == 0:
                _exchange(draft, a, size - 1)
    return draft.done("all_to_all", "pairwise", size)


PLANS: dict[str, dict[str, Plan]] = {
    "all_gather": {
        "ring": _ring_all_gather,
        "recursive_doubling": _doubling_all_gather,
        "direct": _direct_all_gather,
    },
    "all_reduce": {
        "ring": _ring_all_reduce,
        "tree": _tree_all_reduce,
        "recursive_doubling": _doubling_all_reduce,
        "halving_doubling": _halving_doubling_all_reduce,
        "direct": _direct_all_reduce,
        "two_shot": _two_shot_all_reduce,
    },
    "all_to_all": {"pairwise": _pairwise_all_to_all, "direct": _direct_all_to_all},
    "broadcast": {
        "ring": _ring_broadcast,
        "tree": _tree_broadcast,
        "direct": _direct_broadcast,
    },
    "reduce": {"ring": _ring_reduce, "tree": _tree_reduce, "direct": _direct_reduce},
    "reduce_scatter": {
        "ring": _ring_reduce_scatter,
        "halving_doubling": _halving_reduce_scatter,
        "direct": _direct_reduce_scatter,
    },
}
"""Builders by operation and algorithm."""
