"""The adapter from `CommBackendProtocol` to torch process groups.

This module and its parts in `_process_group` are the only ones of this package that import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ._process_group.agree import CheckedTransport, fingerprint, mismatch
from ._process_group.buffers import tangled
from ._process_group.cost_table import table_by_broadcast, table_by_store
from ._process_group.layer import TransportLayer
from ._process_group.ops import TensorBackend
from ._process_group.recorder import (
    COMPLETED,
    LOCAL,
    P2P_OPS,
    STARTED,
    TAKEN_OVER,
    FlightRecorder,
    Owner as RecordOwner,
    Record,
)
from ._process_group.shim import abort_group, group_facts, group_libraries, make_group
from ._process_group.solo import SoloTransport
from ._process_group.stats import EngineRow
from ._process_group.torch_transport import TorchTransport
from ._process_group.transport import Position, RawCall, RawWork, TorchObject, Transport, WorkReport
from ._process_group.work import completed_future
from .backend_spec import BackendSpec
from .bandwidth import busbw_factor
from .comm_backend import CommBackendProtocol
from .errors import ConfigError
from .observe import check_options, observe_settings
from .topology import CostModelProtocol, CostTable, TopologyManagerProtocol

__all__ = [
    "COMPLETED",
    "LOCAL",
    "P2P_OPS",
    "STARTED",
    "TAKEN_OVER",
    "EngineRow",
    "FlightRecorder",
    "Position",
    "ProcessGroupBackend",
    "RawCall",
    "RawWork",
    "Record",
    "RecordOwner",
    "SoloTransport",
    "TensorBackend",
    "TorchObject",
    "TorchTransport",
    "Transport",
    "TransportLayer",
    "WorkReport",
    "abort_group",
    "busbw_factor",
    "completed_future",
    "fingerprint",
    "group_facts",
    "group_libraries",
    "make_group",
    "mismatch",
    "table_by_broadcast",
    "table_by_store",
    "tangled",
]


class ProcessGroupBackend(TensorBackend):
    """A torch process group behind the protocol; one class for every c10d library.

    What a library lacks is refused by name or lowered by the rules of its spec. The group is
    used, never changed: `close` leaves a group that was handed in alone, and destroys the ones
    that `split` made. Paths for devices are unverified on hardware.

    Args:
        spec: Facts about the library.
        process_group: The group; None is a world of this process alone.
        owned: Whether `close` destroys the group.
        device: Where tensors live; None is the current device of the spec's first type.
        timeout_s: Deadline of every call and wait that gives none.
        topology_manager: Kept for subclasses that choose an algorithm by it.
        cost_model: Lets `explain` name an algorithm and a time. All ranks hand one in or none
            does: the constructor then gives every rank the table of rank 0's, so that they choose
            alike.
        cost_table: A table that the ranks agreed on before; nothing is exchanged then.
        options: `check_calls` (bool): compare every collective with the peers' before it is
            sent, so that each rank raises `CollectiveMismatchError` naming both calls; one small
            exchange a call. `statistics`, `flight_entries` and `flight_folder`: see
            `OBSERVE_OPTIONS`. Others are the spec's; unknown ones are refused.

    Raises:
        ConfigError: An unknown option, or a device the backend does not serve.

    """

    def __init__(
        self,
        spec: BackendSpec,
        process_group: TorchObject | None,
        *,
        device: torch.device | str | None = None,
        timeout_s: float = 30.0,
        topology_manager: TopologyManagerProtocol | None = None,
        cost_model: CostModelProtocol | None = None,
        options: Mapping[str, Any] | None = None,
        owned: bool = False,
        cost_table: CostTable | None = None,
    ) -> None:
        where = _device(spec, device)
        transport: TorchTransport | SoloTransport
        if process_group is None:
            transport = SoloTransport(where)
        else:
            transport = TorchTransport(process_group, where, timeout_s, owned=owned)
        self._init(spec, transport, timeout_s, topology_manager, cost_model, options, cost_table)

    def _init(
        self,
        spec: BackendSpec,
        transport: TorchTransport | SoloTransport,
        timeout_s: float,
        topology_manager: TopologyManagerProtocol | None,
        cost_model: CostModelProtocol | None,
        options: Mapping[str, Any] | None,
        cost_table: CostTable | None,
    ) -> None:
        self.options = dict(options or {})
        check_options(spec.name, self.options, {"check_calls", *spec.options})
        self._inner = transport
        checks = bool(self.options.get("check_calls")) and transport.size > 1
        layered = self._layer(transport, timeout_s)
        super().__init__(
            spec,
            CheckedTransport(layered) if checks else layered,
            timeout_s=timeout_s,
            topology_manager=topology_manager,
            cost_model=cost_model,
            cost_table=cost_table,
            observe=observe_settings(self.options),
        )
        if isinstance(transport, TorchTransport):
            transport.on_expired = self._expired

    def _layer(self, transport: Transport, timeout_s: float) -> Transport:
        """The transport to issue calls on; a subclass may put its own in front of the group's."""
        return transport

    @property
    def process_group(self) -> torch.distributed.ProcessGroup | None:
        if isinstance(self._inner, SoloTransport):
            return None
        group: torch.distributed.ProcessGroup = self._inner.group
        return group

    def _wrap(self, transport: Transport) -> CommBackendProtocol:
        # `split` of a layer gives the group's own transport.
        inner = transport
        assert isinstance(inner, (TorchTransport, SoloTransport))
        # Subclasses may have other constructors; a split keeps everything but the group.
        backend = type(self).__new__(type(self))
        backend._init(
            self.spec,
            inner,
            self.timeout_s,
            self.topology_manager,
            self.cost_model,
            self._options_of(inner),
            self._cost_table,
        )
        return backend

    def _options_of(self, part: Transport) -> Mapping[str, Any]:  # Any: each option's own type
        """The options of a group that was split off."""
        return self.options


def _device(spec: BackendSpec, device: torch.device | str | None) -> torch.device:
    if device is None:
        kind = spec.device_types[0]
        if kind == "cpu":
            return torch.device("cpu")
        api: Any = getattr(torch, kind, None)  # torch.cuda, torch.npu, …
        current = getattr(api, "current_device", None)
        return torch.device(kind, current() if current is not None else 0)
    found = torch.device(device)
    if found.type not in spec.device_types:
        served = ", ".join(spec.device_types)
        raise ConfigError(f"{spec.name} serves {served}, not {found}")
    return found
