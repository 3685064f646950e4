"""The random calls of `fuzz_shm`, and what each must give, from every rank's inputs."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

import torch

SMALL_SLOT, DEFAULT_SLOT = 4096, 262144
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
MOVED = (torch.complex64, torch.float8_e4m3fn)
REDUCING = ("all_reduce", "reduce", "reduce_scatter_tensor", "reduce_scatter")
WITH_ROOT = ("broadcast", "reduce", "gather", "scatter")
OPS = (
    *("all_reduce",) * 6,
    *("all_gather_into_tensor", "all_gather", "reduce_scatter_tensor", "reduce_scatter") * 2,
    *("all_to_all_single", "uneven", "all_to_all", "broadcast", "reduce", "gather", "scatter") * 2,
    "barrier",
    *("send",) * 3,
    "batch_p2p",
)


@dataclass
class Step:
    """One call, as all ranks know it."""

    number: int
    op: str
    group: int
    dtype: torch.dtype
    reduction: str
    shape: tuple
    root: int
    peer: int
    tag: int
    style: str  # sync, async or registered
    form: str  # plain, strided, offset or symmetric
    special: bool  # infinities, NaN and zeros of either sign
    seed: str

    def splits(self, size):
        """Rows that each rank gives to each."""
        rng = random.Random(f"{self.seed}/splits")
        return [[rng.choice((0, 1, 2, 5, self.shape[0])) for _ in range(size)] for _ in range(size)]


def draw(rng, number, sizes, slots, p2p):
    """A random call; `sizes` and `slots` are those of the groups: ranks, and bytes of a slot."""
    group = rng.randrange(len(sizes))
    op = rng.choice(OPS)
    while op in ("send", "batch_p2p") and (not p2p or sizes[group] < 2):
        op = rng.choice(OPS)
    dtype = rng.choice(FLOATS + INTEGERS + (torch.bool,))
    reduction = rng.choice(("sum", "sum", "min", "max", "product"))
    if op in REDUCING:
        if dtype.is_floating_point and rng.random() < 0.2:
            reduction = "avg"
        elif not dtype.is_floating_point and rng.random() < 0.3:
            reduction = rng.choice(("band", "bor", "bxor"))
    elif rng.random() < 0.1:
        dtype = rng.choice(MOVED)
    n = elements(rng, dtype.itemsize, slots[group], sizes[group])
    shape = (n,)
    if n and rng.random() < 0.3:
        shape = (max(1, n // 3), rng.choice((1, 3)))
    if op == "uneven":
        shape = (min(n, 2 * slots[group] // dtype.itemsize) // 3 + 1, rng.choice((1, 3)))
    style = rng.choices(("sync", "async", "registered"), (6, 3, 1))[0]
    form = rng.choices(("plain", "strided", "offset", "symmetric"), (5, 1, 2, 3))[0]
    peer = rng.randrange(sizes[group])
    root = rng.randrange(sizes[group])
    if op in ("send", "batch_p2p") and peer == root:
        peer = (root + 1) % sizes[group]
    return Step(
        number, op, group, dtype, reduction, shape, root, peer, rng.randint(0, 3), style, form,
        rng.random() < 0.1, f"{rng.random()}",
    )  # fmt: skip


def elements(rng, itemsize, slot, size):
    """None, few, about so many as a slot or a rank's part of it holds, or several slots full."""
    per_slot, kind = slot // itemsize, rng.random()
    large = slot > SMALL_SLOT  # to fill such slots takes long: mostly they are not filled
    if kind < 0.05:
        return 0
    if kind < 0.6:
        return rng.randint(1, 300)
    if large and kind < 0.92:
        return rng.randint(1, 32768 // itemsize)
    if kind < (0.98 if large else 0.9):
        n = rng.choice((per_slot, per_slot // size)) * rng.randint(1, 3)
        return max(1, n + rng.choice((-1, 0, 1, rng.randint(-9, 9))))
    if large or kind < 0.96:
        return rng.randint(1, (4 if large else 8) * per_slot)
    return (65536 + rng.randint(-70, 40000)) // itemsize


def values(step, rank, shape, salt=""):
    """What a rank puts in; the same whoever asks."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{step.seed}/{rank}/{salt}".encode()))
    dtype = step.dtype
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    if not dtype.is_floating_point and not dtype.is_complex:
        info = torch.iinfo(dtype)
        low = info.min // 2 if dtype is torch.int64 else info.min
        high = info.max // 2 if dtype is torch.int64 else info.max
        return torch.randint(low, high, shape, generator=generator).to(dtype)
    x = torch.randn(shape, generator=generator) * 10 ** (zlib.crc32(step.seed.encode()) % 5 - 2)
    if step.special and x.numel() and not dtype.is_complex:
        odd = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1e-40, 3e38])
        picks = torch.randint(0, len(odd), shape, generator=generator)
        x = torch.where(torch.rand(shape, generator=generator) < 0.2, odd[picks], x)
    return x.to(dtype)


# -- what should come out -------------------------------------------------------------------


def folded(step, xs):
    """The reduction in rank order; 16-bit floats in float32, rounded once."""
    wide = torch.float32 if step.dtype in (torch.float16, torch.bfloat16) else step.dtype
    total = xs[0].to(wide)
    for x in xs[1:]:
        total = {
            "sum": torch.add,
            "avg": torch.add,
            "min": torch.minimum,
            "max": torch.maximum,
            "product": torch.mul,
            "band": torch.bitwise_and,
            "bor": torch.bitwise_or,
            "bxor": torch.bitwise_xor,
        }[step.reduction](total, x.to(wide))
    if step.reduction == "avg":
        total = total / len(xs)
    return total.to(step.dtype)


def operands(step, rank, size):
    """What is reduced into a rank's result, by rank."""
    if step.op in ("all_reduce", "reduce"):
        return [values(step, r, step.shape) for r in range(size)]
    return [values(step, r, (size, *step.shape))[rank] for r in range(size)]


def expected(step, rank, size):
    """Results on `rank`, from the inputs of all."""
    op, shape = step.op, step.shape
    if op == "barrier":
        return []
    if op in ("send", "batch_p2p"):
        return [values(step, step.root, shape)] if rank == step.peer else []
    if op in REDUCING:
        return (
            []
            if op == "reduce" and rank != step.root
            else [folded(step, operands(step, rank, size))]
        )
    if op == "all_gather_into_tensor":
        return [torch.stack([values(step, r, shape) for r in range(size)])]
    if op == "all_gather" or (op == "gather" and rank == step.root):
        return [values(step, r, shape) for r in range(size)]
    if op == "gather":
        return []
    if op == "broadcast":
        return [values(step, step.root, shape)]
    if op == "scatter":
        return [values(step, step.root, (size, *shape))[rank]]
    if op == "all_to_all_single":
        return [torch.stack([values(step, r, (size, *shape))[rank] for r in range(size)])]
    if op == "uneven":
        splits = step.splits(size)
        parts = [
            values(step, r, (sum(splits[r]), *shape[1:])).split(splits[r])[rank]
            for r in range(size)
        ]
        return [torch.cat(parts)]
    return [values(step, r, shape, f"to{rank}") for r in range(size)]  # all_to_all


def same(x, y):
    """Equal bit for bit, but for the payload of a NaN."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    if x.dtype in FLOATS:
        nan = x.isnan()
        if not torch.equal(nan, y.isnan()):
            return False
        x, y = x.masked_fill(nan, 0), y.masked_fill(nan, 0)
    return torch.equal(bits(x), bits(y))


def right(step, got, want, rank, size):
    """Whether a result is what it should be.

    Of two zeros of different signs either is the smaller, and the larger: a minimum or maximum
    is equal to the expected one, and has the bits of one of the operands.
    """
    if step.op not in REDUCING or step.reduction not in ("min", "max"):
        return same(got, want)
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    if same(got, want):
        return True
    if not torch.equal(got.nan_to_num(7), want.nan_to_num(7)):
        return False
    found = got.isnan() & want.isnan()
    for x in operands(step, rank, size):
        found |= (got == x) & (got.signbit() == x.signbit())
    return bool(found.all())


def bits(x):
    x = x.contiguous().as_strided((x.numel(),), (1,))
    return x.view(torch.uint8) if x.numel() else torch.empty(0, dtype=torch.uint8)
