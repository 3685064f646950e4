"""Ranks as threads of one process, with real results, real deadlines and faults on demand."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch

from sagellm.core.protocols import (
    BackendSpec,
    CommBackendProtocol,
    CommTimeoutError,
    ConfigError,
    CostModelProtocol,
    CostTable,
    PeerLostError,
    TopologyManagerProtocol,
)
from sagellm.core.protocols.observe import OBSERVE_OPTIONS, observe_settings
from sagellm.core.protocols.process_group import RawCall, RawWork, TensorBackend, Transport

from ._mock_group import Faults, MockGroup, Transfer
from ._specs import MOCK

__all__ = ["MockBackend", "MockWorld"]

T = TypeVar("T")


class MockTransport(Transport):
    """One rank's access to a `MockGroup`."""

    def __init__(self, group: MockGroup, rank: int) -> None:
        self._group = group
        self._rank = rank

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._group.size

    @property
    def global_ranks(self) -> tuple[int, ...]:
        return self._group.global_ranks

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def group_name(self) -> str:
        return self._group.name

    def issue(self, call: RawCall) -> RawWork:
        return self._group.issue(self._rank, call)

    def issue_batch(self, calls: Sequence[RawCall]) -> list[RawWork]:
        return [self.issue(call) for call in calls]

    def explain_failure(self, describe: str, error: Exception) -> Exception:
        named: Exception = error
        if isinstance(error, CommTimeoutError):
            missing = self._group.missing(self._rank)
            if missing:
                who = ", ".join(f"{r} (global {self.global_ranks[r]})" for r in missing)
                named = CommTimeoutError(f"{describe}: no sign of rank {who}: {error}")
            else:
                named = CommTimeoutError(f"{describe}: {error}")
        elif isinstance(error, PeerLostError):
            named = PeerLostError(f"{describe}: {error}", rank=error.rank)
        self.abort(str(named))
        return named

    def abort(self, reason: str) -> None:
        self._group.leave(self._rank, reason)

    def close(self) -> None:
        """The world keeps the group: other ranks may still be in it."""

    def split(self, ranks: Sequence[int], name: str, timeout_s: float) -> Transport | None:
        child = self._group.split(self._rank, ranks, name)
        return None if child is None else MockTransport(child, list(ranks).index(self._rank))


class MockBackend(TensorBackend):
    """One rank of a `MockWorld`; constructed without one it is a world of its own.

    It says nothing about speed. It keeps the protocol: order, deadlines that name the missing
    ranks, mismatches that name both calls, dead ranks, sub-groups.
    """

    in_process_world: ClassVar[type[MockWorld]]
    """How the conformance kit gets ranks of this backend, which are threads of its process."""

    def __init__(
        self,
        spec: BackendSpec | None = None,
        process_group: None = None,
        *,
        device: torch.device | str | None = None,
        timeout_s: float = 30.0,
        topology_manager: TopologyManagerProtocol | None = None,
        cost_model: CostModelProtocol | None = None,
        options: Mapping[str, Any] | None = None,  # Any: each option has its own type
        transport: MockTransport | None = None,
        cost_table: CostTable | None = None,
    ) -> None:
        if process_group is not None:
            raise ConfigError("mock does not run on process groups; use MockWorld(size)")
        unknown = sorted(set(options or {}) - set(OBSERVE_OPTIONS))
        if unknown:
            known = ", ".join(sorted(OBSERVE_OPTIONS))
            raise ConfigError(f"mock has no option {', '.join(unknown)}; known: {known}")
        if device is not None and torch.device(device).type != "cpu":
            raise ConfigError(f"mock serves cpu, not {device}")
        super().__init__(
            MOCK if spec is None else spec,
            MockWorld(1).transport(0) if transport is None else transport,
            timeout_s=timeout_s,
            topology_manager=topology_manager,
            cost_model=cost_model,
            cost_table=cost_table,
            observe=observe_settings(options or {}),
        )

    def _wrap(self, transport: Transport) -> CommBackendProtocol:
        assert isinstance(transport, MockTransport)
        return MockBackend(
            self.spec,
            timeout_s=self.timeout_s,
            topology_manager=self.topology_manager,
            cost_model=self.cost_model,
            transport=transport,
            cost_table=self._cost_table,
        )


class MockWorld:
    """`size` ranks in this process, and the faults a test gives them.

    >>> world = MockWorld(2)
    >>> [x.item() for x in world.run(lambda b: b.all_reduce(torch.tensor(b.rank + 1)))]
    [3, 3]
    """

    def __init__(self, size: int, *, timeout_s: float = 30.0) -> None:
        if size < 1:
            raise ConfigError(f"a world needs at least one rank, got size={size}")
        self.size = size
        self.timeout_s = timeout_s
        self.ledger: list[Transfer] = []
        self._faults = Faults()
        self._lock = threading.RLock()
        self._group = MockGroup("mock", tuple(range(size)), self._faults, self.ledger, self._lock)
        self._backends: dict[int, MockBackend] = {}

    def transport(self, rank: int) -> MockTransport:
        """One rank's transport, for a backend of one's own."""
        return MockTransport(self._group, self._check(rank))

    def backend(self, rank: int) -> MockBackend:
        """The backend of one rank, always the same one; use it from one thread at a time."""
        with self._lock:
            found = self._backends.get(self._check(rank))
            if found is None:
                found = MockBackend(timeout_s=self.timeout_s, transport=self.transport(rank))
                self._backends[rank] = found
            return found

    def run(self, fn: Callable[[MockBackend], T], *, timeout_s: float | None = None) -> list[T]:
        """Run `fn(backend)` on every rank at once, and return what each returned, by rank.

        A rank whose `fn` raises leaves the group, so that nobody waits for it.

        Raises:
            Exception: The first one by time; the others are consequences as a rule.
            CommTimeoutError: Some rank's `fn` did not return in `timeout_s` (None: twice the
                world's deadline).

        """
        results: dict[int, T] = {}
        errors: list[BaseException] = []

        def body(rank: int) -> None:
            backend = self.backend(rank)
            try:
                results[rank] = fn(backend)
            except BaseException as e:
                errors.append(e)
                backend.abort(f"its function raised {type(e).__name__}: {e}")

        threads = [
            threading.Thread(target=body, args=(r,), name=f"mock-rank-{r}", daemon=True)
            for r in range(self.size)
        ]
        for thread in threads:
            thread.start()
        end = time.monotonic() + (2 * self.timeout_s if timeout_s is None else timeout_s)
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        if errors:
            raise errors[0]
        stuck = [r for r in range(self.size) if r not in results]
        if stuck:
            raise CommTimeoutError(f"ranks {stuck} of {self.size} did not return in time")
        return [results[r] for r in range(self.size)]

    # -- faults ---------------------------------------------------------------------------

    def delay(self, rank: int, seconds: float) -> None:
        """Let everything rank sends from now on arrive `seconds` late; 0 ends it."""
        with self._lock:
            self._faults.delays_s[self._check(rank)] = seconds

    def corrupt(self, rank: int, op: str = "") -> None:
        """Flip a bit in what rank contributes to `op` from now on; every op when empty."""
        with self._lock:
            self._faults.corrupt[self._check(rank)] = op

    def heal(self, rank: int) -> None:
        """End the rank's delays and corruption; the dead stay dead."""
        with self._lock:
            self._faults.delays_s.pop(rank, None)
            self._faults.corrupt.pop(rank, None)

    def drop(self, rank: int) -> None:
        """Kill a rank: its peers' calls, in flight and later, raise `PeerLostError`."""
        with self._lock:
            self._faults.dead.add(self._check(rank))
        self._group.lose(rank)

    def sent_bytes(self, rank: int) -> int:
        """Bytes the rank would have sent so far, by the ring formulas of `Transfer`."""
        with self._lock:
            return sum(
                t.sent_bytes for t in self.ledger if t.rank == rank and t.group == self._group.name
            )

    def _check(self, rank: int) -> int:
        if not 0 <= rank < self.size:
            raise ConfigError(f"rank {rank} is not in 0..{self.size - 1}")
        return rank


MockBackend.in_process_world = MockWorld
