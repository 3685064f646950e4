"""Ranks as threads of one process, with real results, real deadlines and faults on demand."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch

from sagellm.core.protocols import (
    BackendSpec,
    Choice,
    CommBackendProtocol,
    CommTimeoutError,
    ConfigError,
    CostModelProtocol,
    CostTable,
    PeerLostError,
    TopologyManagerProtocol,
)
from sagellm.core.protocols.observe import check_options, observe_settings
from sagellm.core.protocols.process_group import RawCall, RawWork, TensorBackend, Transport

from ._hier.partition import HostMap, options_of_part
from ._mock_clock import MockLinks, VirtualClock
from ._mock_group import Faults, MockGroup, Transfer
from ._scheduled import ScheduledTransport
from ._specs import MOCK
from .choice import AlgorithmTable, asked_algorithms, explain_choice

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

    It says nothing about real speed. It keeps the protocol: order, deadlines that name the missing
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
        self.options = dict(options or {})
        facts = MOCK if spec is None else spec
        check_options(facts.name, self.options, facts.options)
        if device is not None and torch.device(device).type != "cpu":
            raise ConfigError(f"mock serves cpu, not {device}")
        inner = MockWorld(1).transport(0) if transport is None else transport
        self._tables: tuple[AlgorithmTable, ...] = (asked_algorithms(self.options),)
        hosts = self.options.get("hosts")
        order = None if hosts is None else HostMap.of(hosts, inner.rank).order
        super().__init__(
            facts,
            ScheduledTransport(inner, self._tables, order),
            timeout_s=timeout_s,
            topology_manager=topology_manager,
            cost_model=cost_model,
            cost_table=cost_table,
            observe=observe_settings(options or {}),
        )

    def explain(self, op: str, nbytes: int) -> Choice:
        """What would run for such a call: the schedule that was asked for, or the mock itself."""
        return explain_choice(self._tables, super().explain(op, nbytes), op, nbytes, self.size)

    def _wrap(self, transport: Transport) -> CommBackendProtocol:
        assert isinstance(transport, MockTransport)
        return MockBackend(
            self.spec,
            timeout_s=self.timeout_s,
            topology_manager=self.topology_manager,
            cost_model=self.cost_model,
            options=options_of_part(self.options, self.global_ranks, transport),
            transport=transport,
            cost_table=self._cost_table,
        )


class MockWorld:
    """`size` ranks in this process, and the faults a test gives them.

    >>> world = MockWorld(2)
    >>> [x.item() for x in world.run(lambda b: b.all_reduce(torch.tensor(b.rank + 1)))]
    [3, 3]

    Time is virtual: it starts at 0 and passes as `links` say, and nothing sleeps for it.

    >>> world = MockWorld(4, links=MockLinks(1e-6, 1e9), algorithms="all_reduce:ring")
    >>> _ = world.run(lambda b: b.all_reduce(torch.ones(1000)))
    >>> world.sent_bytes(0), round(world.now(0) * 1e6, 3)  # 2(n-1) steps of 1 us and 1000 bytes
    (6000, 12.0)

    Args:
        size: Ranks.
        timeout_s: Deadline of every call, in real time.
        links: What messages cost; None costs nothing.
        algorithms: Which calls are made of messages, see `parse_algorithms`; the others are
            computed at once and cost what `Transfer` says.
        hosts: The ranks of each host: rings pass them host by host.

    """

    def __init__(
        self,
        size: int,
        *,
        timeout_s: float = 30.0,
        links: MockLinks | None = None,
        algorithms: str | None = None,
        hosts: Sequence[Sequence[int]] | None = None,
    ) -> None:
        if size < 1:
            raise ConfigError(f"a world needs at least one rank, got size={size}")
        self.size = size
        self.timeout_s = timeout_s
        self.ledger: list[Transfer] = []
        self._faults = Faults()
        self._lock = threading.RLock()
        asked = {"algorithms": algorithms, "hosts": hosts}
        self._options = {name: value for name, value in asked.items() if value is not None}
        self._clock = VirtualClock(size, MockLinks() if links is None else links)
        self._group = MockGroup(
            "mock", tuple(range(size)), self._faults, self.ledger, self._lock, self._clock
        )
        self._backends: dict[int, MockBackend] = {}

    def transport(self, rank: int) -> MockTransport:
        """One rank's transport, for a backend of one's own."""
        return MockTransport(self._group, self._check(rank))

    def backend(self, rank: int) -> MockBackend:
        """The backend of one rank, always the same one; use it from one thread at a time."""
        with self._lock:
            found = self._backends.get(self._check(rank))
            if found is None:
                found = MockBackend(
                    timeout_s=self.timeout_s,
                    options=self._options,
                    transport=self.transport(rank),
                )
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

    def delay(self, rank: int, seconds: float, *, virtual: bool = False) -> None:
        """Let everything rank sends from now on arrive `seconds` late; 0 ends it.

        Args:
            rank: Who is late.
            seconds: By how much.
            virtual: Late by the virtual clock only; nobody really waits.

        """
        with self._lock:
            faults = self._faults
            (faults.late_s if virtual else faults.delays_s)[self._check(rank)] = seconds

    def lose_messages(self, rank: int, count: int = 1) -> None:
        """Let the next messages of rank vanish: it sees them sent, and nobody receives them."""
        with self._lock:
            self._faults.losing[self._check(rank)] = count

    def corrupt(self, rank: int, op: str = "") -> None:
        """Flip a bit in what rank contributes to `op` from now on; every op when empty."""
        with self._lock:
            self._faults.corrupt[self._check(rank)] = op

    def heal(self, rank: int) -> None:
        """End the rank's delays, losses and corruption; the dead stay dead."""
        with self._lock:
            self._faults.delays_s.pop(rank, None)
            self._faults.late_s.pop(rank, None)
            self._faults.losing.pop(rank, None)
            self._faults.corrupt.pop(rank, None)

    def drop(self, rank: int) -> None:
        """Kill a rank: its peers' calls, in flight and later, raise `PeerLostError`."""
        with self._lock:
            self._faults.dead.add(self._check(rank))
        self._group.lose(rank)

    # -- time and traffic -----------------------------------------------------------------

    def now(self, rank: int) -> float:
        """Virtual seconds that have passed for a rank: up to the end of what it waited for."""
        with self._lock:
            return self._clock.now[self._check(rank)]

    def advance(self, rank: int, seconds: float) -> None:
        """Let virtual time pass for a rank, as if it computed."""
        with self._lock:
            self._clock.now[self._check(rank)] += seconds

    def sent_bytes(self, rank: int) -> int:
        """Bytes the rank sent so far: its messages, and what `Transfer` says of other calls."""
        with self._lock:
            return sum(
                t.sent_bytes for t in self.ledger if t.rank == rank and t.group == self._group.name
            )

    def _check(self, rank: int) -> int:
        if not 0 <= rank < self.size:
            raise ConfigError(f"rank {rank} is not in 0..{self.size - 1}")
        return rank


MockBackend.in_process_world = MockWorld
