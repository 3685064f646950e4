"""What every backend over a torch process group does to choose algorithms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sagellm.core.protocols import (
    BackendSpec,
    Choice,
    CostModelProtocol,
    CostTable,
    TopologyManagerProtocol,
)
from sagellm.core.protocols.process_group import (
    ProcessGroupBackend,
    SoloTransport,
    TorchTransport,
    Transport,
    table_by_broadcast,
)

from ._scheduled import ScheduledTransport, agree_on_algorithms
from .calibrate import cached_table, keep_table, measure, table_key
from .choice import AlgorithmTable, asked_algorithms, explain_choice, measured_table
from .settings import CollectiveSettings

__all__ = ["ChosenBackend"]


class ChosenBackend(ProcessGroupBackend):
    """A process group whose calls may be run by schedules of this package."""

    _tables: tuple[AlgorithmTable, ...] = ()
    _scheduled: ScheduledTransport | None = None

    def _layer(self, transport: Transport, timeout_s: float) -> Transport:
        asked = asked_algorithms(self.options)
        self._tables = (asked,)
        if transport.size == 1:
            return transport
        store = getattr(transport, "store", None)
        if store is not None:
            more = ("calibrate",) if self._wants_calibration() else ()
            agree_on_algorithms(
                store,
                transport.group_name,
                transport.rank,
                transport.size,
                ",".join([*sorted(map(str, asked.rules)), *more]),
                timeout_s,
            )
        self._scheduled = ScheduledTransport(transport, self._tables)
        return self._scheduled

    def _init(
        self,
        spec: BackendSpec,
        transport: TorchTransport | SoloTransport,
        timeout_s: float,
        topology_manager: TopologyManagerProtocol | None,
        cost_model: CostModelProtocol | None,
        options: Mapping[str, Any] | None,  # Any: each option has its own type
        cost_table: CostTable | None,
    ) -> None:
        self.spec = spec
        super()._init(spec, transport, timeout_s, topology_manager, cost_model, options, cost_table)
        if self._scheduled is None:
            return
        # The same on all ranks: core agreed on the one, and `_calibrate` does on the other.
        table, what = self._cost_table, "cost table"
        if table is None and self._wants_calibration():
            table, what = self._calibrate(), "calibration"
        if table is not None:
            measured = measured_table(table, self.size, f"{what} {table.fingerprint}")
            self._use(*self._tables[:1], measured)

    def _wants_calibration(self) -> bool:
        if "calibrate" not in self.spec.options:
            return False
        wanted = self.options.get("calibrate")
        return CollectiveSettings.load().calibrate if wanted is None else bool(wanted)

    def _use(self, *tables: AlgorithmTable) -> None:
        self._tables = tables
        if self._scheduled is not None:
            self._scheduled.tables = tables

    def _calibrate(self) -> CostTable:
        """Rank 0's earlier measurement, or a new one. Collective."""
        asked = self._tables
        self._use()
        key = table_key(self)
        known = cached_table(key) if self.rank == 0 else None
        hit = torch.tensor([known is not None])
        self.broadcast(hit, 0)
        if hit.item():
            ours = known or CostTable(key, 1, {})
        else:
            ours = measure(self, lambda table: self._use(table), key)
        table = table_by_broadcast(self._transport, ours, self.timeout_s)
        if self.rank == 0 and known is None:
            keep_table(table)
        self._use(*asked)
        self.reset_stats()
        return table

    def explain(self, op: str, nbytes: int) -> Choice:
        """What would run for such a call: a schedule that was asked for or measured, or native."""
        return explain_choice(self._tables, self._native_choice(op, nbytes), op, nbytes, self.size)

    def _native_choice(self, op: str, nbytes: int) -> Choice:
        """What the library would run."""
        return super().explain(op, nbytes)
