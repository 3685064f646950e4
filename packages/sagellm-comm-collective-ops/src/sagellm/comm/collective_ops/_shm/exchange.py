"""Small values that the ranks of a group give each other through their store."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from sagellm.core.protocols import CommTimeoutError, DistributedRuntimeError
from sagellm.core.protocols.process_group import TorchObject

__all__ = ["Exchange"]


class Exchange:
    """One meeting of `size` ranks at a torch store, in phases.

    Each rank counts its own meetings under a label, so that no key is ever used twice; `leave`
    lets the last rank remove the keys of this one.

    Args:
        store: Shared by the ranks.
        rank: This rank.
        size: Ranks.
        label: Names the group: different sets of ranks must use different labels.
        timeout_s: Longest time for all phases together.

    """

    def __init__(
        self, store: TorchObject, rank: int, size: int, label: str, timeout_s: float
    ) -> None:
        self.rank, self.size = rank, size
        self.deadline = time.monotonic() + timeout_s
        self._timeout_s = timeout_s
        self._store = store
        self._phases: list[str] = []
        turn = self._ask(lambda: store.add(f"sagellm/shm/{label}/turn/{rank}", 1))
        self._prefix = f"sagellm/shm/{label}/{turn}"

    def all(
        self,
        phase: str,
        value: Mapping[str, Any],  # Any: JSON
        watch: Callable[[], None] | None = None,
    ) -> list[dict[str, Any]]:
        """Every rank's value of `phase`, by rank. `watch` is called again and again until then.

        Raises:
            CommTimeoutError: Names the ranks that gave none.

        """
        keys = [f"{self._prefix}/{phase}/{r}" for r in range(self.size)]
        self._phases.append(phase)
        self.tell(phase, value)
        pause_s = 0.0005
        while not self._ask(lambda: self._store.check(keys)):
            if watch is not None:
                watch()
            if time.monotonic() >= self.deadline:
                missing = [r for r in range(self.size) if not self.has(phase, r)]
                if missing:
                    raise CommTimeoutError(
                        f"no sign of rank {', '.join(map(str, missing))} of {self.size} within "
                        f"{self._timeout_s} s: waited for its {phase!r} as rank {self.rank}"
                    )
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, 0.01)
        return [json.loads(self._ask(lambda k=key: self._store.get(k))) for key in keys]

    def tell(self, phase: str, value: Mapping[str, Any]) -> None:  # Any: JSON
        """Publish this rank's value of `phase` without waiting for the others'."""
        key = f"{self._prefix}/{phase}/{self.rank}"
        self._ask(lambda: self._store.set(key, json.dumps(value)))

    def has(self, phase: str, rank: int) -> bool:
        """Whether a rank has published its value of `phase`."""
        return bool(self._ask(lambda: self._store.check([f"{self._prefix}/{phase}/{rank}"])))

    def seen(self, phase: str) -> dict[int, dict[str, Any]]:
        """The values of `phase` that are there now."""
        found = [r for r in range(self.size) if self.has(phase, r)]
        keys = {r: f"{self._prefix}/{phase}/{r}" for r in found}
        return {r: json.loads(self._ask(lambda k=k: self._store.get(k))) for r, k in keys.items()}

    def leave(self) -> None:
        """Say that this rank has read everything; the last one removes the keys."""
        left = f"{self._prefix}/left"
        if self._ask(lambda: self._store.add(left, 1)) < self.size:
            return
        keys = [f"{self._prefix}/{p}/{r}" for p in self._phases for r in range(self.size)]
        for key in [*keys, left]:
            with contextlib.suppress(RuntimeError, NotImplementedError):  # a store may not delete
                self._store.delete_key(key)

    def _ask(self, task: Callable[[], Any]) -> Any:  # noqa: ANN401 - as the store answers
        try:
            return task()
        except RuntimeError as e:  # torch's store errors, all of them RuntimeError
            raise DistributedRuntimeError(
                f"the store shared by {self.size} ranks failed: {e}"
            ) from e
