"""A gloo transport that torch's table of groups knows nothing of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from sagellm.core.protocols import CommTimeoutError
from sagellm.core.protocols.process_group import TorchTransport

from .libraries import GroupPlan, forget_group, library_group

__all__ = ["PrivateTransport"]


class PrivateTransport(TorchTransport):
    """Calls on a gloo group of its own over the ranks of a plan; every one of them makes it.

    Unlike groups of torch's table it is made, and split, while the default group is being made.

    Args:
        plan: Whose ranks.
        reports: As of `TorchTransport`.

    """

    def __init__(self, plan: GroupPlan, *, reports: bool = True) -> None:
        group = library_group("gloo", "cpu", plan)
        super().__init__(group, torch.device("cpu"), plan.timeout_s, reports=reports)
        self._name, self._plan = plan.name, plan

    def split(
        self, ranks: Sequence[int], name: str, timeout_s: float, *, reports: bool = True
    ) -> PrivateTransport | None:
        if self.rank not in ranks:
            return None
        store, members = self._plan.store, tuple(self.global_ranks[r] for r in ranks)
        key = f"sagellm/split/{'-'.join(map(str, members))}"
        try:
            # Counted by each member for itself: a key is never used twice.
            turn = store.add(f"{key}/{self.rank}", 1)
            part = GroupPlan(
                store=dist.PrefixStore(f"{key}/{turn}", store),  # type: ignore[attr-defined]  # torch's stubs omit it
                rank=ranks.index(self.rank),
                size=len(members),
                global_ranks=members,
                timeout_s=timeout_s,
                name=f"{name}/{turn}",
            )
            return PrivateTransport(part, reports=reports)
        except RuntimeError as e:  # a rank that never came, or the store
            text = (
                f"group {name!r} of global ranks {list(members)} not formed in {timeout_s} s: {e}"
            )
            raise CommTimeoutError(text) from e

    def close(self) -> None:
        super().close()
        forget_group(self.group)
