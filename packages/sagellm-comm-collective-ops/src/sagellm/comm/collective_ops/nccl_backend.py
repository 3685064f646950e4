"""NCCL, and what it shares with RCCL. Unverified on hardware."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from sagellm.core.protocols import (
    BackendSpec,
    BackendUnavailableError,
    Choice,
    CostModelProtocol,
    TopologyManagerProtocol,
)
from sagellm.core.protocols.process_group import table_by_store

from ._algorithm import apply_algorithm, choose_algorithm, read_fabric
from ._chosen import ChosenBackend
from ._groups import find_source, group_for, is_used_as_it_is
from ._specs import NCCL

__all__ = ["NCCLBackend"]


class NCCLBackend(ChosenBackend):
    """An NCCL process group behind the protocol. Unverified on hardware.

    Importing this needs no CUDA; constructing it does. With a cost model or a topology manager
    the algorithm (ring or tree) is chosen when the group is made: by NCCL_ALGO where one wins at
    every size, else NCCL's tuner is left alone. `explain` says which, and why.

    Args:
        spec: Facts about the library; None is this package's.
        process_group: As for `create_comm_backend`.
        device: None is the current CUDA device.
        timeout_s: Deadline of every call, kept by a watchdog; and of meeting the other ranks.
        topology_manager: Source of links for the choice of algorithm.
        cost_model: Preferred source for the choice of algorithm.
        options: `algorithm` (`auto`, `ring`, `tree`), `algorithms`, `hosts` and `check_calls`.

    Raises:
        BackendUnavailableError: No device, or a torch without its library.

    """

    default_spec: ClassVar[BackendSpec] = NCCL

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
        probe = facts.probe()
        if not probe.available:
            raise BackendUnavailableError(
                f"backend {facts.name!r} cannot run here: {probe.reason}; "
                f"next step: {facts.install_hint}, or use create_comm_backend('auto')"
            )
        if not torch.cuda.is_available():
            raise BackendUnavailableError(
                f"backend {facts.name!r} cannot run here: torch {torch.__version__} sees no "
                f"device; next step: check the driver and what CUDA_VISIBLE_DEVICES shows, or use "
                f"create_comm_backend('auto')"
            )
        where = torch.device("cuda" if device is None else device)
        if where.index is None:
            where = torch.device("cuda", torch.cuda.current_device())
        source = find_source(process_group, timeout_s)
        table = None if cost_model is None else cost_model.freeze()
        if table is not None and source.size > 1 and source.store is not None:
            # Before there is a group: the algorithm is told to the library when it is made.
            table = table_by_store(source.store, source.rank, table, timeout_s)
        choice = choose_algorithm(
            str((options or {}).get("algorithm", "auto")),
            source.size,
            cost_model,
            table,
            None if topology_manager is None else read_fabric(topology_manager),
        )
        applied = apply_algorithm(
            choice,
            group_exists=is_used_as_it_is(facts, source, where),
            version=_library_version(),
        )
        group, owned = group_for(facts, source, where, timeout_s)
        super().__init__(
            facts,
            group,
            device=where,
            timeout_s=timeout_s,
            topology_manager=topology_manager,
            cost_model=cost_model,
            options=options,
            owned=owned,
            # A group without a store has the table broadcast over it.
            cost_table=None if source.store is None else table,
        )
        self.algorithm = applied.algorithm
        self.algorithm_reason = applied.reason

    def _native_choice(self, op: str, nbytes: int) -> Choice:
        """What NCCL would run: the forced algorithm, or the one the model expects."""
        expected = super()._native_choice(op, nbytes)
        reason = getattr(self, "algorithm_reason", "as the group it was split from")
        forced = getattr(self, "algorithm", None)
        if forced is None:
            return replace(expected, reason=f"{expected.reason}; {reason}")
        if op != "all_reduce":
            # Of other operations nothing is forced, or nothing that they have.
            return expected
        return Choice(expected.backend, forced, reason, expected.estimate_us)


def _library_version() -> tuple[int, ...]:
    """NCCL's, or the one that RCCL follows; empty in a torch without either."""
    version: Any = torch.cuda.nccl.version  # torch leaves it untyped
    return tuple(version()) if dist.is_nccl_available() else ()
