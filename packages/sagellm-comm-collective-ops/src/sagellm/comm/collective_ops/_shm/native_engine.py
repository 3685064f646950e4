"""The C engine of the shm backend, called through ctypes."""

from __future__ import annotations

import ctypes
import math
import mmap
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from sagellm.core.protocols import BackendUnavailableError, ConfigError, ReduceOp
from sagellm.core.protocols.process_group import RawCall

from .choice import ALGORITHMS, SYMMETRIC_BYTES, Override, one_shot_bytes
from .engine import CallRecord, Engine, EngineFailure, EngineTotals, Shortcut
from .layout import (
    CAUSES,
    CONTROL_BYTES,
    DTYPES,
    F_UNEVEN,
    OPS,
    REASON,
    REDUCTIONS,
    Layout,
    pack,
)
from .native_library import library

__all__ = ["NativeEngine"]

HOLD_NS = 200_000
"""Longest wait with the interpreter's lock held: letting go costs up to its switch interval
(5 ms) as soon as another Python thread computes."""
HOLD_BYTES = 1 << 20
"""Longest tensor for which the lock is held at all: about 100 us of copying."""
CHUNK_BYTES = 128 * 1024
"""Piece in which one_shot takes longer tensors: two slots, and the tensor's, stay in the cache."""

_FAILED, _TANGLED = 2, 4
_HISTOGRAM, _RING = 256, 512
_REASON_BYTES = CONTROL_BYTES - REASON - 1
_OPS = {name: i for i, name in enumerate(OPS)}
_DTYPES = {getattr(torch, name): i for i, name in enumerate(DTYPES)}
_REDUCTIONS = {name: i for i, name in enumerate(REDUCTIONS)}

Word = tuple[str, torch.dtype | None, str | None, int | None, bool]


class NativeEngine(Engine):
    """Collectives by the compiled library on a segment.

    Args:
        memory: The whole segment.
        layout: Its shape.
        rank: This rank.
        fds: A connected socket to each peer, of which only the end is watched.
        polls: How often a flag is looked at before this rank gives way.
        statistics: Whether calls are counted and remembered.
        algorithms: Overrides of the choice, the same on all ranks.

    Raises:
        BackendUnavailableError: There is no library that works here.

    """

    name = "native"

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
        found = library()
        if isinstance(found, str):
            raise BackendUnavailableError(f"shm has no native engine here: {found}")
        self._memory: mmap.mmap | None = memory
        self._layout, self._rank = layout, rank
        self._anchor = ctypes.c_char.from_buffer(memory)
        sockets = (ctypes.c_int32 * layout.world)(*[fds.get(r, -1) for r in range(layout.world)])
        context = found.free.sage_shm_open(
            ctypes.addressof(self._anchor),
            rank,
            layout.world,
            layout.slot_bytes,
            layout.data_offset,
            layout.arena_offset,
            layout.arena_bytes,
            sockets,
            polls,
            statistics,
        )
        if not context:
            raise MemoryError("no memory for the native engine")
        self._context = ctypes.c_void_p(context)
        weakref.finalize(self, found.free.sage_shm_free, self._context).atexit = False
        self._lib = found
        self._held, self._go = found.held.sage_shm_run, found.held.sage_shm_go
        self._lock = threading.Lock()
        self._words: dict[Word, int] = {}
        found.free.sage_shm_tune(
            self._context,
            one_shot_bytes(layout.world, layout.slot_bytes),
            SYMMETRIC_BYTES,
            min(CHUNK_BYTES, layout.slot_bytes),
            HOLD_NS,
            HOLD_BYTES,
        )
        for op, low, high, algorithm in algorithms or ():
            number = ALGORITHMS.index(algorithm)
            found.free.sage_shm_override(self._context, _OPS[op], low, high, number)

    # -- calls ----------------------------------------------------------------------------

    def run(self, call: RawCall) -> None:
        op, outputs, inputs = call.op, call.outputs, call.inputs
        x = inputs[0] if inputs else outputs[0] if outputs else None
        key = (op, None if x is None else x.dtype, call.reduce_op, call.peer, False)
        word = self._words.get(key)
        if word is None:
            word = self._word(key)
        if op in ("all_to_all", "gather", "scatter"):
            self._run_with_table(call, key, word)
            return
        rc = self._held(
            self._context,
            word,
            0 if x is None else x.nbytes,
            inputs[0].data_ptr() if inputs else None,
            outputs[0].data_ptr() if outputs else None,
            None,
            int(call.timeout_s * 1e9),
        )
        if rc:
            self._go_on(rc)

    def _run_with_table(self, call: RawCall, key: Word, word: int) -> None:
        """A call that has lengths or several tensors beside its first ones."""
        world, op = self._layout.world, call.op
        table: Sequence[int] = ()
        tensors = call.outputs if op == "scatter" else call.inputs
        if op == "all_to_all" and (call.in_splits or call.out_splits):
            word = self._words.get((*key[:4], True)) or self._word((*key[:4], True))
            gives = _lengths(call.inputs[0], call.in_splits, world)
            table = [*gives, *_lengths(call.outputs[0], call.out_splits, world)]
        elif op == "gather":
            table = [out.data_ptr() for out in call.outputs]
        elif op == "scatter":
            table = [x.data_ptr() for x in call.inputs]
        words = (ctypes.c_int64 * len(table))(*table) if table else None
        rc = self._held(
            self._context,
            word,
            tensors[0].nbytes,
            call.inputs[0].data_ptr() if op != "scatter" else None,
            call.outputs[0].data_ptr() if call.outputs else None,
            words,
            int(call.timeout_s * 1e9),
        )
        if rc:
            self._go_on(rc)

    def _go_on(self, rc: int) -> bool:
        """Wait on with the interpreter's lock released; signal handlers run between turns.

        False where the call was not begun: its tensors are tangled.
        """
        if rc == _TANGLED:
            return False
        resume = self._lib.free.sage_shm_resume
        while rc and rc != _FAILED:
            rc = resume(self._context)
        if rc:
            told = (ctypes.c_int64 * 3)()
            self._lib.free.sage_shm_failure(self._context, told)
            cause, rank, step = told
            raise EngineFailure(CAUSES[cause] if cause < len(CAUSES) else "error", rank, step)
        return True

    def _word(self, key: Word) -> int:
        op, dtype, reduction, root, uneven = key
        word = self._words[key] = pack(
            _OPS[op],
            -1 if dtype is None else _DTYPES.get(dtype, -1),
            _REDUCTIONS[reduction] if reduction else 0,
            F_UNEVEN if uneven else 0,
            -1 if root is None else root,
        )
        return word

    def prepare(
        self, op: str, x: Tensor, out: Tensor, reduce_op: str, timeout_s: float
    ) -> Callable[[], None]:
        key = (op, x.dtype, None if op == "all_gather" else reduce_op, None, False)
        handle = self._lib.free.sage_shm_prepare(
            self._context,
            self._words.get(key) or self._word(key),
            x.nbytes,
            x.data_ptr(),
            out.data_ptr(),
            int(timeout_s * 1e9),
        )
        if not handle:
            raise MemoryError("no memory for a prepared call")
        go, go_on, pointer = self._go, self._go_on, ctypes.c_void_p(handle)
        kept, at, to = (x, out), x.data_ptr(), out.data_ptr()

        def ready() -> None:
            if x.data_ptr() != at or (out is not x and out.data_ptr() != to):
                raise ConfigError(
                    f"the storage of a registered tensor {tuple(x.shape)} has changed: release "
                    f"the registration before `set_`, `resize_` or `.data =`, and register anew"
                )
            rc = go(pointer)
            if rc:
                go_on(rc)

        end = weakref.finalize(ready, _forget, self._lib.free.sage_shm_forget, pointer, kept)
        end.atexit = False  # a daemon thread may still be in a call
        return ready

    def shortcut(
        self,
        op: str,
        dtype: torch.dtype,
        reduce_op: ReduceOp | None = None,
        root: int | None = None,
        *,
        timeout_s: float,
    ) -> Shortcut:
        handle = self._lib.free.sage_shm_prepare(
            self._context,
            self._word((op, dtype, reduce_op, root, False)),
            0,
            None,
            None,
            int(timeout_s * 1e9),
        )
        if not handle:
            raise MemoryError("no memory for a prepared call")
        run, go_on, pointer = self._lib.held.sage_shm_go_at, self._go_on, ctypes.c_void_p(handle)

        def go(x: Tensor, out: Tensor) -> bool:
            at = x.data_ptr()
            rc = run(pointer, at, at if out is x else out.data_ptr(), x.nbytes)
            return not rc or go_on(rc)

        end = weakref.finalize(go, _forget, self._lib.free.sage_shm_forget, pointer, None)
        end.atexit = False
        return go

    def algorithm(self, op: str, nbytes: int, *, symmetric: bool = False) -> str:
        choose = self._lib.free.sage_shm_algorithm
        return ALGORITHMS[choose(self._context, _OPS[op], nbytes, symmetric)]

    # -- what is known of them --------------------------------------------------------------

    def totals(self) -> Sequence[EngineTotals]:
        width = 7 + _HISTOGRAM
        with self._lock:
            if self._memory is None:
                return ()
            room = self._lib.free.sage_shm_totals(self._context, None, 0)
            rows = np.empty((room, width), np.int64)
            self._lib.free.sage_shm_totals(self._context, rows.ctypes.data, room)
        return [
            EngineTotals(
                OPS[op],
                ALGORITHMS[algorithm],
                bucket,
                calls,
                nbytes,
                total_ns,
                wait_ns,
                tuple(np.trim_zeros(histogram, "b")),
            )
            for op, algorithm, bucket, calls, nbytes, total_ns, wait_ns, *histogram in rows.tolist()
        ]

    def records(self) -> Sequence[CallRecord]:
        rows = np.empty((_RING, 7), np.int64)
        with self._lock:
            if self._memory is None:
                return ()
            count = self._lib.free.sage_shm_records(self._context, rows.ctypes.data)
        return [
            CallRecord(row[0], row[1], row[2], row[3], row[4], row[5], ALGORITHMS[row[6]])
            for row in rows[:count].tolist()
        ]

    def reset_totals(self) -> None:
        with self._lock:
            if self._memory is not None:
                self._lib.free.sage_shm_reset(self._context)

    # -- the end ----------------------------------------------------------------------------

    def poison(self, cause: str, reason: str) -> None:
        with self._lock:
            if self._memory is not None:
                text = reason.encode()[:_REASON_BYTES].decode(errors="ignore").encode()
                self._lib.free.sage_shm_poison(self._context, CAUSES.index(cause), text)

    def close(self) -> None:
        with self._lock:
            if self._memory is not None:
                self._memory = None
                if not self._lib.held.sage_shm_close(self._context):
                    del self._anchor  # else a call does not end, and needs the memory


def _forget(forget: Callable[[object], None], pointer: object, kept: object) -> None:
    forget(pointer)


def _lengths(x: Tensor, splits: Sequence[int], world: int) -> list[int]:
    """Bytes for each rank."""
    if not splits:
        return [x.nbytes // world] * world
    row = math.prod(x.shape[1:]) * x.itemsize
    return [rows * row for rows in splits]
