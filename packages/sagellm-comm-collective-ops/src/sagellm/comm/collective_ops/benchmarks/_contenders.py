"""What a rank runs, by contender: gloo, two MPIs, DeepSpeed's shared memory, and our own backends.

Each contender makes its own buffers, proves one call of each right, and hands back calls without
arguments. Inputs are small integers times 2**-110: sums are exact in every dtype, and a buffer
reduced in place again and again stays finite for `Prepared.uses` calls, after which it is filled
anew outside the timed part.
"""

from __future__ import annotations

import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._barrier import Barrier

if TYPE_CHECKING:
    from torch import Tensor

SCALE = 2.0**-110
DOUBLINGS = 200
TOUCHED_BYTES = 1 << 20
"""Tensors up to here are written by their rank before every single call that is timed: left alone,
a small tensor that is reduced in place by other ranks would stay in one core's cache, where no
program has it. Larger ones do not stay in a cache, and to write them would take as long again."""
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Prepared:
    """Calls of one variant in one case.

    Attributes:
        runs: One call per buffer.
        fill: Brings the buffers back to their first contents.
        check: Fills, runs each call once, and says what is wrong with the results, if anything.
        uses: Calls per buffer until it must be filled again; 0 is never.
        touches: Per buffer, writes this rank's input; empty for large ones.

    """

    runs: Sequence[Callable[[], object]]
    fill: Callable[[], None]
    check: Callable[[], str]
    uses: int
    touches: Sequence[Callable[[], object]] = ()


@dataclass(frozen=True)
class Buffers:
    """Input and output of each of several like calls; both are one tensor where in place."""

    op: str
    rank: int
    world: int
    pairs: Sequence[tuple[Tensor, Tensor]]
    pattern: Tensor

    def fill(self) -> None:
        mine = self.pattern * (self.rank + 1)
        for x, _ in self.pairs:
            x.copy_(mine)

    def expected(self) -> Tensor:
        import torch

        everyone = sum(range(1, self.world + 1))
        if self.op == "all_reduce":
            return self.pattern * everyone
        if self.op == "all_gather":
            return torch.cat([self.pattern * (r + 1) for r in range(self.world)])
        if self.op == "reduce_scatter":
            return self.pattern.chunk(self.world)[self.rank] * everyone
        return self.pattern * (self.rank + 1)

    def prepared(
        self, runs: Sequence[Callable[[], object]], after: Callable[[], object] = lambda: None
    ) -> Prepared:
        def check() -> str:
            expected = self.expected()
            self.fill()
            for i, ((_, out), run) in enumerate(zip(self.pairs, runs, strict=True)):
                run()
                after()
                if not out.equal(expected):
                    at = int((out != expected).nonzero()[0])
                    return (
                        f"buffer {i}: element {at} is {out[at].item()!r}, "
                        f"not {expected[at].item()!r}"
                    )
            return ""

        in_place = self.op == "all_reduce"
        uses = DOUBLINGS // max(1, (self.world - 1).bit_length()) if in_place else 0
        touches = [
            partial(x.fill_, SCALE * (self.rank + 1))
            for x, _ in self.pairs
            if x.nbytes <= TOUCHED_BYTES
        ]
        return Prepared(runs, self.fill, check, uses, touches)


def buffers(
    case: dict[str, Any], rank: int, world: int, empty: Callable[..., Tensor] | None = None
) -> Buffers:
    """Several buffers, so that a call does not always find the last one's in the cache.

    `nbytes` is one rank's part: the input of all_reduce and all_gather, reduce_scatter's output.
    """
    import torch

    make = empty or torch.empty
    op, dtype = case["op"], getattr(torch, case["dtype"])
    part = int(case["nbytes"]) // dtype.itemsize
    n_in = part * world if op == "reduce_scatter" else part
    n_out = part * world if op == "all_gather" else part
    count = 4 if int(case["nbytes"]) <= 1 << 20 else 2
    pattern = ((torch.arange(7) + 1) * SCALE).to(dtype).repeat(n_in // 7 + 1)[:n_in]
    pairs = []
    for _ in range(count):
        x = make((n_in,), dtype=dtype)
        out = x if op == "all_reduce" else make((n_out,), dtype=dtype)
        pairs.append((x, out.zero_()))
    return Buffers(op, rank, world, pairs, pattern)


class Contender(ABC):
    rank: int
    world: int

    @abstractmethod
    def prepare(self, variant: str, case: dict[str, Any]) -> Prepared | str:
        """Calls of this variant, or why there are none."""

    def forget(self) -> None:
        """Let go of what `prepare` made."""
        return

    @abstractmethod
    def close(self) -> None:
        """Leave the group."""


class Torch(Contender):
    """`torch.distributed` as its users call it; also plain copies, for the roofline."""

    def __init__(self, backend: str, rank: int, world: int, folder: Path) -> None:
        from datetime import timedelta

        import torch.distributed as dist

        self.rank, self.world = rank, world
        self._folder = folder
        self._meet: Barrier | None = None
        dist.init_process_group(
            backend,
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=TIMEOUT_S),
        )

    def prepare(self, variant: str, case: dict[str, Any]) -> Prepared | str:
        import torch.distributed as dist

        if variant == "handover":
            return self._handover(case)
        if variant == "copy":
            found = buffers({**case, "op": "copy"}, self.rank, self.world)
            return found.prepared([partial(out.copy_, x) for x, out in found.pairs])
        found = buffers(case, self.rank, self.world)
        if case["op"] == "all_reduce":
            return found.prepared([partial(dist.all_reduce, x) for x, _ in found.pairs])
        if case["op"] == "all_gather":
            call = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        else:
            call = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        return found.prepared([partial(call, out, x) for x, out in found.pairs])

    def _handover(self, case: dict[str, Any]) -> Prepared | str:
        """The data's way and nothing else: copy in, one flag, add what the other copied in."""
        import torch

        if self.world != 2:
            return "it is between two ranks"
        self._meet = self._meet or Barrier(self._folder / "handover", self.rank, self.world)
        meet = self._meet.wait
        found = buffers(case, self.rank, self.world)
        nbytes, dtype = int(case["nbytes"]), found.pattern.dtype
        file = str(self._folder / f"memory-{nbytes}")
        memory = torch.from_file(file, shared=True, size=2 * nbytes, dtype=torch.uint8)
        slots = memory.view(dtype).chunk(2)
        mine, theirs = slots[self.rank], slots[1 - self.rank]

        def run(x: Tensor) -> None:
            mine.copy_(x)
            meet()
            x.add_(theirs)

        return found.prepared([partial(run, x) for x, _ in found.pairs], after=meet)

    def close(self) -> None:
        import torch.distributed as dist

        dist.destroy_process_group()


class Mpi(Contender):
    """An MPI through mpi4py, with its buffer descriptions made beforehand: its best case."""

    def __init__(self, world: int) -> None:
        # Any, and no import statement: mpi4py may be absent where this is type-checked
        self._mpi: Any = importlib.import_module("mpi4py.MPI")
        self._comm: Any = self._mpi.COMM_WORLD
        self.rank, self.world = int(self._comm.rank), int(self._comm.size)
        if self.world != world:
            raise RuntimeError(f"MPI started a world of {self.world}, not of {world}")

    def prepare(self, variant: str, case: dict[str, Any]) -> Prepared | str:
        mpi, comm = self._mpi, self._comm
        if case["dtype"] != "float32":
            return f"mpi4py has no reduction of {case['dtype']}"
        found = buffers(case, self.rank, self.world)
        given = [([x.numpy(), mpi.FLOAT], [out.numpy(), mpi.FLOAT]) for x, out in found.pairs]
        if case["op"] == "all_reduce":
            runs = [partial(comm.Allreduce, mpi.IN_PLACE, out) for _, out in given]
        elif case["op"] == "all_gather":
            runs = [partial(comm.Allgather, x, out) for x, out in given]
        else:
            runs = [partial(comm.Reduce_scatter_block, x, out) for x, out in given]
        return found.prepared(runs)

    def close(self) -> None:
        self._mpi.Finalize()


class DeepSpeed(Contender):
    """DeepSpeed's all_reduce over shared memory, called as the operator that it registers."""

    def __init__(self, rank: int, world: int, folder: Path) -> None:
        import torch

        from ._deepspeed import load

        self.rank, self.world = rank, world
        os.environ.update(LOCAL_SIZE=str(world), MASTER_ADDR="bench", MASTER_PORT=folder.name)
        load().initialize(world, rank)
        self._call = torch.ops.deepspeed.inference_all_reduce_

    def prepare(self, variant: str, case: dict[str, Any]) -> Prepared | str:
        if case["op"] != "all_reduce" or case["dtype"] not in ("float32", "bfloat16", "float16"):
            return f"it has no {case['op']} of {case['dtype']}"
        found = buffers(case, self.rank, self.world)
        return found.prepared([partial(self._call, x) for x, _ in found.pairs])

    def close(self) -> None:
        return  # it has no end; the launch process unlinks its segments


def make(kind: str, rank: int | None, world: int, folder: Path) -> Contender:
    import torch

    torch.set_num_threads(1)
    if kind in ("mpich", "openmpi"):
        return Mpi(world)
    assert rank is not None
    if kind == "gloo":
        return Torch("gloo", rank, world, folder)
    if kind == "deepspeed":
        return DeepSpeed(rank, world, folder)
    from ._ours import Shm, register_c10d

    if kind.startswith("c10d-"):
        register_c10d(kind.removeprefix("c10d-"))
        return Torch("sagellm", rank, world, folder)
    return Shm(rank, world, folder)
