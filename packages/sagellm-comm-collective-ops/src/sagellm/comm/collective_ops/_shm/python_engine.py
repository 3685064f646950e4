"""The Python engine: the readable reference of the shm backend, on x86-64."""

from __future__ import annotations

import functools
import math
import mmap
import platform
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from sagellm.core.protocols import ReduceOp
from sagellm.core.protocols.process_group import RawCall, tangled

from .choice import Override, choose
from .engine import CallRecord, Engine, EngineFailure, EngineTotals, Shortcut
from .layout import DTYPES, F_UNEVEN, Layout
from .python_arithmetic import Fold, fold_of, moved, quiet, typed
from .python_flags import Flags, clock
from .python_memory import Memory
from .python_plans import Plans, packed
from .python_prepared import OneStep, one_step
from .python_records import Records, tag_of

__all__ = ["PythonEngine", "supported"]

SHORTCUTS = 128
"""Sizes of one kind of call that a shortcut remembers."""

_TYPES = frozenset(getattr(torch, name) for name in DTYPES)


def supported() -> bool:
    """Whether this machine keeps the order of stores that the engine relies on."""
    return platform.machine() in ("x86_64", "AMD64")


class PythonEngine(Engine):
    """Collectives by numpy, torch and `memmove` on a segment.

    Args:
        memory: The whole segment.
        layout: Its shape.
        rank: This rank.
        fds: A connected socket to each peer, of which only the end is watched.
        polls: How often a flag is looked at before this rank gives way.
        statistics: Whether calls are counted and remembered.
        algorithms: Overrides of the choice, the same on all ranks.

    """

    name = "python"

    def __init__(
        self,
        memory: mmap.mmap,
        layout: Layout,
        rank: int,
        fds: Mapping[int, int],
        *,
        polls: int,
        statistics: bool = True,
        algorithms: Sequence[Override] | None = None,
    ) -> None:
        self._layout, self._rank = layout, rank
        self._overrides = tuple(algorithms or ())
        self._one_shot: int | None = None
        self._flags = Flags(memory, layout, rank, fds, polls=polls)
        self._memory = Memory(memory, layout, rank)
        self._plans = Plans(self._flags, self._memory, rank, layout.world, layout.slot_bytes)
        self._records = Records() if statistics else None
        self._fold = functools.lru_cache(64)(
            lambda op, dtype: fold_of(op, dtype, layout.world, self._memory.scratch)
        )
        self._shortcuts: list[dict[int, OneStep | None]] = []
        self._run = quiet(self._run_loudly)

    # -- calls ----------------------------------------------------------------------------

    def run(self, call: RawCall) -> None:
        try:
            self._run(call)
        except EngineFailure:
            raise
        except BaseException as e:
            self.poison("error", f"{call.op}: {type(e).__name__}: {e}")
            raise

    def _run_loudly(self, call: RawCall) -> None:
        uneven = bool(call.in_splits or call.out_splits)
        nbytes = _bytes_of(call, uneven)
        word = packed(call, F_UNEVEN if uneven else 0)
        offset = self._symmetric_offset(call, nbytes) if call.op == "all_reduce" else 0
        self._flags.open(word, 0 if uneven else nbytes, call.timeout_s, (offset, offset))
        records = self._records
        if records is None:
            self._perform(call, nbytes, uneven, offset)
            self._flags.calls += 1
            return
        started, waited = clock(), self._flags.wait_ns
        records.running = (word, nbytes), started
        algorithm = self._perform(call, nbytes, uneven, offset)
        self._flags.calls += 1
        waited = self._flags.wait_ns - waited
        records.write(tag_of(word, algorithm), nbytes, started, clock(), waited)

    def _perform(self, call: RawCall, nbytes: int, uneven: bool, offset: int) -> str:
        """Take the steps of a call that has been opened; returns the algorithm."""
        plans, op = self._plans, call.op
        if op == "all_reduce":
            return self._all_reduce(call.outputs[0], self._fold_for(call), offset != 0)
        if op == "barrier":
            plans.barrier()
        elif op == "reduce_scatter":
            plans.reduce_scatter(call.outputs[0], call.inputs[0], self._fold_for(call))
        elif op == "reduce":
            plans.reduce(call.outputs[0], self._fold_for(call), _root(call))
        elif op == "all_gather":
            plans.all_gather(call.outputs[0].data_ptr(), call.inputs[0].data_ptr(), nbytes)
        elif op == "broadcast":
            plans.broadcast(call.outputs[0].data_ptr(), nbytes, _root(call))
        elif op == "gather":
            outs = [out.data_ptr() for out in call.outputs]
            plans.gather(outs, call.inputs[0].data_ptr(), nbytes, _root(call))
        elif op == "scatter":
            xs = [x.data_ptr() for x in call.inputs]
            plans.scatter(call.outputs[0].data_ptr(), xs, nbytes, _root(call))
        else:
            out, x = call.outputs[0], call.inputs[0]
            gives = self._lengths(x, call.in_splits)
            takes = self._lengths(out, call.out_splits)
            exchange = plans.all_to_all_uneven if uneven else plans.all_to_all
            exchange(out.data_ptr(), x.data_ptr(), gives, takes)
        return "direct"

    def _all_reduce(self, x: Tensor, fold: Fold, symmetric: bool) -> str:
        plans, nbytes = self._plans, x.nbytes
        if symmetric and plans.symmetric(x, fold):
            return "symmetric"
        algorithm = self.algorithm("all_reduce", nbytes)
        staged = plans.one_shot if algorithm == "one_shot" else plans.two_shot
        if not staged(x, fold):
            staged(x, fold)  # a peer offered its arena; all know now that not everybody does
        return algorithm

    def _fold_for(self, call: RawCall) -> Fold:
        fold: Fold = self._fold(call.reduce_op or "sum", call.outputs[0].dtype)
        return fold

    def _symmetric_offset(self, call: RawCall, nbytes: int) -> int:
        """The word of `layout.SYMMETRIC`: 0 where the tensor is staged."""
        if not self._layout.arena_bytes:
            return 0
        offset = self._memory.arena_offset(call.outputs[0].data_ptr(), nbytes)
        if offset is None or self.algorithm(call.op, nbytes, symmetric=True) != "symmetric":
            return 0
        return offset + 1

    def _lengths(self, x: Tensor, splits: Sequence[int]) -> list[int]:
        """Bytes for each rank."""
        if not splits:
            return [x.nbytes // self._layout.world] * self._layout.world
        row = math.prod(x.shape[1:]) * x.itemsize
        return [rows * row for rows in splits]

    def prepare(
        self, op: str, x: Tensor, out: Tensor, reduce_op: str, timeout_s: float
    ) -> Callable[[], None]:
        call = (
            RawCall(op, [], [x], timeout_s=timeout_s)
            if op == "all_reduce"
            else RawCall(op, [x], [out], timeout_s=timeout_s)
        )
        if op != "all_gather":
            call.reduce_op = reduce_op  # type: ignore[assignment]  # any string that equals one
        step = self._step(call, x.dtype, x.nbytes)
        if step is None:
            return functools.partial(self.run, call)
        array = moved if op == "all_gather" else typed
        return functools.partial(step, array(x), array(out))

    def shortcut(
        self,
        op: str,
        dtype: torch.dtype,
        reduce_op: ReduceOp | None = None,
        root: int | None = None,
        *,
        timeout_s: float,
    ) -> Shortcut:
        call = RawCall(op, reduce_op=reduce_op, peer=root, timeout_s=timeout_s)
        array = typed if reduce_op else moved
        steps: dict[int, OneStep | None] = {}
        self._shortcuts.append(steps)

        def general(x: Tensor, out: Tensor) -> None:
            call.inputs, call.outputs = [] if out is x else [x], [out]
            self.run(call)
            call.inputs, call.outputs = [], []

        def go(x: Tensor, out: Tensor) -> bool:
            if out is not x and self._tangled(op, x, out):
                return False
            nbytes = x.nbytes
            try:
                step = steps[nbytes]
            except KeyError:
                self._flags.check_poison()  # a closed engine has no memory to make one for
                if len(steps) == SHORTCUTS:
                    steps.clear()
                step = steps[nbytes] = self._step(call, dtype, nbytes)
            if step is None:
                general(x, out)
            elif out is x:
                elements = array(x)
                step(elements, elements)
            else:
                step(array(x), array(out))
            return True

        return go

    def _tangled(self, op: str, x: Tensor, out: Tensor) -> bool:
        part, whole = (x, out) if op == "all_gather" else (out, x)
        return tangled(part, whole, self._rank * part.nbytes)

    def _step(self, call: RawCall, dtype: torch.dtype, nbytes: int) -> OneStep | None:
        """The whole of a call as one step, None if it takes more or may be symmetric."""
        op, layout = call.op, self._layout
        if dtype not in _TYPES or not nbytes or self.algorithm(op, nbytes) == "two_shot":
            return None
        if layout.arena_bytes and self.algorithm(op, nbytes, symmetric=True) == "symmetric":
            return None  # peers' tensors may be symmetric
        step = one_step(
            call,
            dtype,
            nbytes,
            self._flags,
            self._memory,
            self._records,
            self._fold(call.reduce_op, dtype) if call.reduce_op else None,
            slot_bytes=layout.slot_bytes,
        )
        return step and quiet(step)

    def algorithm(self, op: str, nbytes: int, *, symmetric: bool = False) -> str:
        layout = self._layout
        return choose(
            op,
            nbytes,
            layout.world,
            layout.slot_bytes,
            symmetric=symmetric,
            overrides=self._overrides,
            one_shot=self._one_shot,
        )

    def tune(self, one_shot_bytes: int) -> None:
        self._one_shot = one_shot_bytes
        for steps in self._shortcuts:
            steps.clear()

    # -- what is known of them --------------------------------------------------------------

    def totals(self) -> Sequence[EngineTotals]:
        return self._records.totals() if self._records else ()

    def records(self) -> Sequence[CallRecord]:
        return self._records.last() if self._records else ()

    def reset_totals(self) -> None:
        if self._records:
            self._records.reset()

    # -- the end ----------------------------------------------------------------------------

    def poison(self, cause: str, reason: str) -> None:
        self._flags.poison(cause, reason)

    def close(self) -> None:
        self._flags.close()
        for steps in self._shortcuts:
            steps.clear()
        self._memory.close()


def _root(call: RawCall) -> int:
    assert call.peer is not None, f"{call.op} without a root"
    return call.peer


def _bytes_of(call: RawCall, uneven: bool) -> int:
    """Bytes of this rank's input; of its output for scatter, whose input only the root has."""
    tensors = call.outputs if call.op == "scatter" else call.inputs or call.outputs
    return tensors[0].nbytes if tensors else 0
