"""How backends choose algorithms: what was asked, else what was modelled or measured."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
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
    TensorBackend,
    TorchTransport,
    Transport,
    table_by_broadcast,
)

from ._hier.partition import HostMap, options_of_part
from ._schedule_plans import PLANS
from ._scheduled import ScheduledTransport, agree_on_options
from .calibrate import (
    SIZES,
    cached_table,
    is_whole,
    keep_table,
    measure,
    sample_model,
    table_key,
)
from .choice import NATIVE, AlgorithmTable, asked_algorithms, explain_choice, measured_table
from .settings import wants_calibration

__all__ = ["Chooser", "ChosenBackend"]


class Chooser:
    """The tables that one backend chooses by, equal on all ranks.

    Args:
        asked: What users wrote, by precedence.
        names: Algorithms by operation that a model or a measurement may choose from.
        default: Of those, what runs without a table; None where that depends on the size.
        apply: Makes the backend run by tables.
        measuring: Arguments of `measure`.

    """

    def __init__(
        self,
        asked: Sequence[AlgorithmTable],
        names: Mapping[str, Collection[str]],
        default: str | None,
        apply: Callable[[Sequence[AlgorithmTable]], None],
        **measuring: Any,  # noqa: ANN401 - as `measure` takes them
    ) -> None:
        self.tables = tuple(asked)
        self.costs: CostTable | None = None
        self._names = names
        self._default = default
        self._apply = apply
        self._measuring = measuring
        self._sizes: Sequence[int] = measuring.get("sizes", SIZES)
        apply(self.tables)

    def settle(
        self,
        backend: TensorBackend,
        transport: Transport,
        table: CostTable | None,
        *,
        calibrate: bool,
        facts: Sequence[str] = (),
    ) -> None:
        """Choose by the backend's cost model from now on, else by a calibration where wanted.

        A calibration is collective, and `table` the same on all ranks.

        Args:
            backend: Whose algorithms they are.
            transport: Broadcasts rank 0's calibration.
            table: Of its cost model.
            calibrate: Whether one is wanted.
            facts: What else makes groups measure alike.

        """
        if transport.size == 1:
            return
        planned: Sequence[int] = ()
        if backend.cost_model is not None and table is not None:
            names = {op: self._compared(op) for op in self._names}
            costs = sample_model(backend.cost_model, table, names, transport.size)
            what = "cost model"
        elif calibrate:
            costs, what = self._calibrate(backend, transport, facts), "calibration"
            planned = self._sizes
        else:
            return
        self.costs = costs
        source = f"{what} {costs.fingerprint}"
        found = measured_table(costs, transport.size, source, self._names, self._default, planned)
        self._use((*self.tables, found))

    def _use(self, tables: Sequence[AlgorithmTable]) -> None:
        self.tables = tuple(tables)
        self._apply(self.tables)

    def _compared(self, op: str) -> tuple[str, ...]:
        names = self._names[op]
        return (*(() if self._default is None else (self._default,)), *names)

    def _calibrate(
        self, backend: TensorBackend, transport: Transport, facts: Sequence[str]
    ) -> CostTable:
        """Rank 0's earlier measurement, or a new one, which is kept if it is whole."""
        asked = self.tables
        self._use(())
        names = {op: self._compared(op) for op in self._names}
        key = table_key(backend, facts)
        known = cached_table(key) if backend.rank == 0 else None
        hit = torch.tensor([known is not None])
        backend.broadcast(hit, 0)
        if hit.item():
            ours = known or CostTable(key, 1, {})
        else:
            ours = measure(backend, lambda t: self._use((t,)), key, names, **self._measuring)
        table = table_by_broadcast(transport, ours, backend.timeout_s)
        whole = is_whole(table, names, transport.size, self._sizes)
        if backend.rank == 0 and known is None and whole:
            keep_table(table)
        self._use(asked)
        backend.reset_stats()
        return table


class ChosenBackend(ProcessGroupBackend):
    """A process group whose calls may be run by schedules of this package."""

    _chooser: Chooser | None = None

    def _layer(self, transport: Transport, timeout_s: float) -> Transport:
        asked = asked_algorithms(self.options)
        hosts = self.options.get("hosts")
        order = None if hosts is None else HostMap.of(hosts, transport.rank).order
        if transport.size == 1:
            return transport
        store = getattr(transport, "store", None)
        if store is not None:
            more = [] if order is None else [f"hosts {order}"]
            more += ["calibrate"] if self._wants_calibration() else []
            agree_on_options(
                store,
                transport.group_name,
                transport.rank,
                transport.size,
                ",".join([*sorted(map(str, asked.rules)), *more]),
                timeout_s,
            )
        scheduled = ScheduledTransport(transport, order=order)
        self._chooser = Chooser((asked,), PLANS, NATIVE, scheduled.use)
        return scheduled

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
        if self._chooser is not None:
            # The same on all ranks: core agreed on the table.
            calibrate = self._wants_calibration()
            self._chooser.settle(self, self._transport, self._cost_table, calibrate=calibrate)

    def _wants_calibration(self) -> bool:
        return "calibrate" in self.spec.options and wants_calibration(self.options)

    def _options_of(self, part: Transport) -> Mapping[str, Any]:  # Any: each option's own type
        return options_of_part(self.options, self.global_ranks, part)

    def explain(self, op: str, nbytes: int) -> Choice:
        """What would run for such a call: a schedule that was asked for or measured, or native."""
        native = self._native_choice(op, nbytes)
        chooser = self._chooser
        tables = () if chooser is None else chooser.tables
        costs = None if chooser is None else chooser.costs
        return explain_choice(tables, native, op, nbytes, self.size, costs=costs)

    def _native_choice(self, op: str, nbytes: int) -> Choice:
        """What the library would run."""
        return super().explain(op, nbytes)
