"""Counters of a backend: calls, bytes and latency, cheap enough to be always on."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping

from sagellm.core.protocols.comm_types import BandwidthStats, OpStats

__all__ = ["CallCounters", "busbw_factor"]

_PER_OCTAVE = 8
"""Buckets per doubling: a percentile is within 5 % of the true one."""
_BUCKETS = 40 * _PER_OCTAVE


def busbw_factor(op: str, size: int) -> float:
    """What nccl-tests multiply algorithm bandwidth by, to compare it with link speed.

    >>> busbw_factor("all_reduce", 4), busbw_factor("all_gather", 4), busbw_factor("send", 4)
    (1.5, 0.75, 1.0)
    """
    if op == "all_reduce":
        return 2 * (size - 1) / size
    if op in ("broadcast", "reduce", "send", "recv", "send_kv_blocks", "recv_kv_blocks"):
        return 1.0
    return (size - 1) / size


class _OpCounter:
    __slots__ = ("buckets", "bytes", "calls", "copies", "errors", "lowered", "seconds", "timed")

    def __init__(self) -> None:
        self.calls = self.errors = self.bytes = self.copies = self.lowered = 0
        self.seconds = 0.0
        self.timed = 0  # bytes whose time is in `seconds`
        self.buckets = [0] * _BUCKETS


class CallCounters:
    """Counts per operation, with latencies in a log histogram. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ops: dict[str, _OpCounter] = {}

    def started(self, op: str, *, copies: int = 0, lowered: int = 0) -> None:
        """Count a call when it is issued."""
        with self._lock:
            counter = self._ops.get(op)
            if counter is None:
                counter = self._ops[op] = _OpCounter()
            counter.calls += 1
            counter.copies += copies
            counter.lowered += lowered

    def finished(self, op: str, nbytes: int, wire_bytes: int, seconds: float | None) -> None:
        """Count its bytes when it is done; `seconds` is None where the host did not see its end."""
        with self._lock:
            counter = self._ops[op]
            counter.bytes += nbytes
            if seconds is None:
                return
            counter.seconds += seconds
            counter.timed += wire_bytes
            # Bucket 0 starts at 10 ns.
            index = int(math.log2(max(seconds, 1e-8) * 1e8) * _PER_OCTAVE)
            counter.buckets[min(index, _BUCKETS - 1)] += 1

    def learned(self, op: str, nbytes: int) -> None:
        """Add bytes that were not known when the call was issued; before `finished`."""
        with self._lock:
            self._ops[op].bytes += nbytes
            self._ops[op].timed += nbytes

    def failed(self, op: str) -> None:
        """Count a call that ended with an error."""
        with self._lock:
            self._ops.setdefault(op, _OpCounter()).errors += 1

    def reset(self) -> None:
        """Forget everything counted so far; works in flight keep being counted at their end."""
        with self._lock:
            self._ops = {op: _OpCounter() for op in self._ops}

    def snapshot(self) -> Mapping[str, OpStats]:
        """The counters as plain data."""
        with self._lock:
            return {
                op: OpStats(
                    calls=c.calls,
                    errors=c.errors,
                    bytes=c.bytes,
                    seconds=c.seconds,
                    p50_us=_percentile(c.buckets, 0.50),
                    p99_us=_percentile(c.buckets, 0.99),
                    copies=c.copies,
                    lowered=c.lowered,
                )
                for op, c in self._ops.items()
            }

    def bandwidth(self, size: int) -> BandwidthStats:
        """Bandwidth over the calls whose end the host saw."""
        with self._lock:
            algbw = {
                op: c.timed / c.seconds for op, c in self._ops.items() if c.seconds and c.timed
            }
        busbw = {op: value * busbw_factor(op, size) for op, value in algbw.items()}
        return BandwidthStats(algbw_bytes_per_s=algbw, busbw_bytes_per_s=busbw)


def _percentile(buckets: list[int], share: float) -> float | None:
    total = sum(buckets)
    if not total:
        return None
    need = math.ceil(total * share)
    for index, count in enumerate(buckets):
        need -= count
        if need <= 0:
            return float(2 ** ((index + 0.5) / _PER_OCTAVE) * 1e-2)
    raise AssertionError("unreachable: the buckets sum to the total")
