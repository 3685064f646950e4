"""A gloo transport that torch's table of groups knows nothing of."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from sagellm.core.protocols import CommTimeoutError
from sagellm.core.protocols.process_group import TorchObject, TorchTransport

from .libraries import GroupPlan, forget_group, library_group

__all__ = ["PrivateTransport"]

_NAP_S = 1e-3


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
        self._turns: dict[tuple[int, ...], int] = {}

    def split(
        self, ranks: Sequence[int], name: str, timeout_s: float, *, reports: bool = True
    ) -> PrivateTransport | None:
        if self.rank not in ranks:
            return None
        store, members = self._plan.store, tuple(self.global_ranks[r] for r in ranks)
        key = f"sagellm/split/{'-'.join(map(str, members))}"
        try:
            turn = self._agree(dist.PrefixStore(key, store), ranks, timeout_s)  # type: ignore[attr-defined]  # as below
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

    def _agree(self, store: TorchObject, ranks: Sequence[int], timeout_s: float) -> int:
        """The number of a split, the same on all members, and never used before.

        The first member counts, and goes once all others have seen the number. A member that
        stayed away from a split sees that one's number first, but nobody goes with it.
        """
        first, *others = ranks
        if self.rank == first:
            turn = int(store.add("turn", 1))
            if others:
                store.wait([f"{turn}/seen/{r}" for r in others], timedelta(seconds=timeout_s))
            store.set(f"{turn}/go", "")
            return turn
        turn, past = 0, self._turns.get(tuple(ranks), 0)
        deadline = time.monotonic() + timeout_s
        while not (turn and store.check([f"{turn}/go"])):
            latest = int(store.add("turn", 0))
            if latest > max(turn, past):
                turn = latest
                store.set(f"{turn}/seen/{self.rank}", "")
            if time.monotonic() > deadline:
                raise RuntimeError(f"rank {self.global_ranks[first]} has not come")
            time.sleep(_NAP_S)
        self._turns[tuple(ranks)] = turn
        return turn

    def close(self) -> None:
        super().close()
        forget_group(self.group)
