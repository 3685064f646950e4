"""What the backends share that stand on transports of this package: shm and hier."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, TypeVar

import torch
import torch.distributed as dist

from sagellm.core.protocols import (
    BackendSpec,
    CommBackendProtocol,
    ConfigError,
    CostModelProtocol,
    CostTable,
    TopologyManagerProtocol,
)
from sagellm.core.protocols.observe import ObserveSettings, observe_settings
from sagellm.core.protocols.process_group import SoloTransport, TensorBackend, Transport

from ._chosen import Chooser
from ._groups import GroupSource, find_source

__all__ = ["OwnBackend"]

S = TypeVar("S")


class OwnBackend(TensorBackend, Generic[S]):
    """Ranks of a group, from whatever tells who they are; `S` are the settings they agree on."""

    default_spec: ClassVar[BackendSpec]
    _settings: S
    _chooser: Chooser | None = None

    def __init__(
        self,
        spec: BackendSpec | None = None,
        process_group: dist.ProcessGroup | None = None,
        *,
        device: torch.device | str | None = None,
        timeout_s: float = 30.0,
        topology_manager: TopologyManagerProtocol | None = None,
        cost_model: CostModelProtocol | None = None,
        options: Mapping[str, Any] | None = None,  # Any: each option has its own type
    ) -> None:
        facts = self.default_spec if spec is None else spec
        where = torch.device("cpu" if device is None else device)
        if where.type not in facts.device_types:
            raise ConfigError(
                f"{facts.name} serves {', '.join(facts.device_types)}, not {device}; "
                f"create_comm_backend('auto', device=...) finds the library of a device"
            )
        if not timeout_s > 0:
            raise ConfigError(f"timeout_s must be above 0, got {timeout_s}")
        given = dict(options or {})
        self._settings = self._read(facts, given)
        observe = observe_settings(given)
        source = find_source(process_group, timeout_s)
        transport: Transport = SoloTransport(where)
        table = None
        if source.size > 1:
            transport, table = self._form(source, given, timeout_s, cost_model)
        self._begin(facts, transport, timeout_s, topology_manager, cost_model, table, observe)

    @classmethod
    @abstractmethod
    def _read(cls, spec: BackendSpec, options: Mapping[str, Any]) -> S:  # Any: an option's own type
        """The settings that a caller's options ask for, all of them checked."""

    @abstractmethod
    def _form(
        self,
        source: GroupSource,
        options: Mapping[str, Any],  # Any: each option has its own type
        timeout_s: float,
        cost_model: CostModelProtocol | None,
    ) -> tuple[Transport, CostTable | None]:
        """Meet the other ranks; the table of the cost model where that was agreed on already."""

    @abstractmethod
    def _settle(self) -> None:
        """Choose algorithms: as asked, and as modelled or measured. Collective."""

    def _begin(
        self,
        spec: BackendSpec,
        transport: Transport,
        timeout_s: float,
        topology_manager: TopologyManagerProtocol | None,
        cost_model: CostModelProtocol | None,
        cost_table: CostTable | None,
        observe: ObserveSettings,
    ) -> None:
        try:
            self._stand_on(transport)
            super().__init__(
                spec,
                transport,
                timeout_s=timeout_s,
                topology_manager=topology_manager,
                cost_model=cost_model,
                cost_table=cost_table,
                observe=observe,
            )
        except BaseException:
            transport.close()
            raise
        try:
            self._settle()
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def _stand_on(self, transport: Transport) -> None:
        """Take note of the transport, before anything else is there."""

    def _wrap(self, transport: Transport) -> CommBackendProtocol:
        backend = type(self).__new__(type(self))
        backend._settings = self._settings
        backend._begin(
            self.spec,
            transport,
            self.timeout_s,
            self.topology_manager,
            self.cost_model,
            self._cost_table,
            self._observing,
        )
        return backend
