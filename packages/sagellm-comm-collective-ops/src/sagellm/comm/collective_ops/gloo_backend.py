"""Gloo: torch's CPU library, over TCP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from sagellm.core.protocols import (
    BackendSpec,
    CostModelProtocol,
    TopologyManagerProtocol,
)

from ._chosen import ChosenBackend
from ._groups import find_source, group_for
from ._specs import GLOO

__all__ = ["GlooBackend"]


class GlooBackend(ChosenBackend):
    """A gloo process group behind the protocol.

    Without a group it stands on the initialised default group, else on RANK, WORLD_SIZE,
    MASTER_ADDR and MASTER_PORT, else on a world of one.

    Args:
        spec: Facts about the library; None is this package's.
        process_group: A gloo group, or a group of another library over whose ranks a gloo group
            is made.
        device: None is the CPU.
        timeout_s: Deadline of every call, and of meeting the other ranks.
        topology_manager: Not used by gloo.
        cost_model: Lets `explain` give a time, and schedules that it has observed to be faster
            than the library run.
        options: `algorithms`, see `parse_algorithms`; `hosts`, the ranks of each host, which rings
            then pass one after another; `calibrate`, to measure schedules against the library;
            `check_calls`, see `ProcessGroupBackend`.

    >>> GlooBackend().size
    1
    """

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
        facts = GLOO if spec is None else spec
        where = torch.device("cpu" if device is None else device)
        source = find_source(process_group, timeout_s)
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
        )
