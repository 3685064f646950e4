"""How a row-parallel layer's partial sums become whole: the one place where overlap can happen.

`reduce(project, x_TD)` must return what `all_reduce(project(x_TD))` would. `project` gives this
rank's partial sum for any rows of its argument, independently of the other rows, so a strategy
may split the rows and communicate one part while it computes the next. All ranks of a group
must split alike: decide from the shape, never from a local measurement.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from sagellm.core.protocols import ConfigError

Project = Callable[[Tensor], Tensor]
RowReduce = Callable[[Project, Tensor], Tensor]


class TensorParallelGroup(Protocol):
    """The part of a `CommBackendProtocol` that a tensor-parallel model needs."""

    @property
    def rank(self) -> int:
        """This process's rank in the group."""

    @property
    def size(self) -> int:
        """How many ranks the group has."""

    # Any: a Tensor, or with async_op=True a Work; the protocol types it as their union
    def all_reduce(self, x: Tensor, op: str = "sum", *, async_op: bool = False) -> Any:  # noqa: ANN401
        """Sums `x` over the ranks in place."""

    def all_gather(self, x: Tensor, *, async_op: bool = False) -> Any:  # noqa: ANN401
        """Returns the `x` of every rank, in rank order."""


def no_reduce(project: Project, x_TD: Tensor) -> Tensor:
    """Returns `project(x_TD)`: the strategy of a group of one."""
    return project(x_TD)


def reduce_after(group: TensorParallelGroup) -> RowReduce:
    """Returns the plain strategy: compute all rows, then one blocking all_reduce."""

    def reduce(project: Project, x_TD: Tensor) -> Tensor:
        y_TD = project(x_TD)
        group.all_reduce(y_TD)
        return y_TD

    return reduce


def reduce_in_chunks(
    group: TensorParallelGroup, chunks: int, *, min_rows: int = 16, timeout_s: float | None = None
) -> RowReduce:
    """Returns a strategy that all_reduces one chunk of rows while the next is computed.

    Args:
        group: Who sums.
        chunks: Most parts to split the rows into.
        min_rows: Fewer rows than this per chunk are not split (a decode step never is).
        timeout_s: Deadline of each wait; None is the group's.

    Raises:
        ConfigError: `chunks` or `min_rows` is below 1.
    """
    if chunks < 1 or min_rows < 1:
        raise ConfigError(f"chunks={chunks}, min_rows={min_rows}: both must be at least 1")
    plain = reduce_after(group)

    def reduce(project: Project, x_TD: Tensor) -> Tensor:
        parts = min(chunks, x_TD.shape[0] // min_rows)
        if parts < 2:
            return plain(project, x_TD)
        started = []
        for rows in x_TD.tensor_split(parts):
            partial = project(rows)
            started.append((partial, group.all_reduce(partial, async_op=True)))
        for _, work in started:
            work.wait(timeout_s)
        return torch.cat([partial for partial, _ in started])

    return reduce
