"""What a group can tell of its calls: statistics, bandwidth, and the flight recorder."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from sagellm.core.protocols.comm_backend import CommBackendProtocol
from sagellm.core.protocols.comm_types import BandwidthStats, CommStats
from sagellm.core.protocols.observe import ObserveSettings

from .flight import flight_dump, write_dump
from .recorder import FlightRecorder
from .snapshot import snapshot
from .stats import CallCounters, EngineRow
from .transport import Transport

__all__ = ["ObservedGroup", "live_groups"]

logger = logging.getLogger(__name__)

_lock = threading.Lock()
_live: weakref.WeakSet[ObservedGroup] = weakref.WeakSet()


def live_groups() -> list[ObservedGroup]:
    """The groups of this process that are not closed."""
    with _lock:
        return list(_live)


class ObservedGroup(CommBackendProtocol):
    """The part of a backend that counts and remembers."""

    _transport: Transport
    _in_flight: int
    timeout_s: float

    @property
    @abstractmethod
    def group_name(self) -> str:
        """Name in messages and statistics."""

    def _retire(self) -> None:
        """Leave the groups that a signal dumps; for `close`."""
        with _lock:
            _live.discard(self)

    def _observe(self, settings: ObserveSettings) -> None:
        self._observing = settings
        self._counting = settings.statistics
        self._counters = CallCounters()
        self._recorder = FlightRecorder(settings.flight_entries)
        with _lock:
            _live.add(self)

    def _engine_totals(self) -> Sequence[EngineRow]:
        """Counts that an engine below the transport keeps itself; none as a rule.

        A backend whose engine counts the calls that it runs returns them here, and may then let
        calls bypass `_run` and its counters. `get_stats` merges the two: of an operation that
        the engine names, the engine's rows stand for all calls, whichever way they came, so that
        none is counted twice; calls that never reached the engine (a group of one, empty
        tensors, hooks that took over) and operations that it does not name stay as counted here.
        Rows name the primitive; those of `all_gather`, `reduce_scatter` and `all_to_all` are
        booked on the tensor form of the method, less the calls that `_run` counted as the list
        form's.
        """
        return ()

    def get_stats(self) -> CommStats:
        ops, details = snapshot(self._counters, self._engine_totals(), self.size)
        return CommStats(
            backend=self.name,
            group=self.group_name,
            rank=self.rank,
            size=self.size,
            ops=ops,
            in_flight=self._in_flight,
            details=details,
        )

    def reset_stats(self) -> None:
        """Start the counters anew; a backend with an engine resets that too."""
        self._counters.reset()

    def get_bandwidth_stats(self) -> BandwidthStats:
        _, details = snapshot(self._counters, self._engine_totals(), self.size)
        algbw: dict[str, float] = {}
        busbw: dict[str, float] = {}
        for op in {d.op for d in details}:
            rows = [d for d in details if d.op == op and d.algbw_bytes_per_s]
            seconds = sum(d.seconds for d in rows)
            if seconds > 0:
                algbw[op] = sum((d.algbw_bytes_per_s or 0.0) * d.seconds for d in rows) / seconds
                busbw[op] = sum((d.busbw_bytes_per_s or 0.0) * d.seconds for d in rows) / seconds
        return BandwidthStats(algbw_bytes_per_s=algbw, busbw_bytes_per_s=busbw)

    def flight_record(self, reason: str = "asked for") -> dict[str, Any]:  # Any: JSON
        """The last calls of this rank on the group in the shape of torch's flight recorder.

        Besides torch's keys it has `sagellm`: who this is, why the dump was made, and who is
        late as far as the ranks told each other (`late`, and `summary` in one sentence). Cheap
        enough to be asked at any time, from any thread.
        """
        return flight_dump(self, self._recorded(), self._transport, reason)

    def _recorded(self) -> FlightRecorder:
        """The last calls; a backend with calls that bypass `_run` adds those."""
        return self._recorder

    @property
    def calls_so_far(self) -> int:
        """How many calls this rank has begun on the group."""
        return self._recorded().sequence

    def dump_to(self, folder: str | os.PathLike[str], reason: str) -> None:
        """Write the flight record to a folder; a full disk is no new failure, it is logged."""
        try:
            path = write_dump(self.flight_record(reason), folder)
        except OSError as e:
            logger.warning("no flight record of group %s was written: %s", self.group_name, e)
        else:
            logger.warning("flight record of group %s: %s", self.group_name, path)

    def _dump(self, reason: str) -> None:
        if self._observing.flight_folder is not None:
            self.dump_to(self._observing.flight_folder, reason)
