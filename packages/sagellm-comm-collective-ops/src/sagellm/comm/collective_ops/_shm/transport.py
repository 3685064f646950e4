"""The transport over a segment: an engine for collectives, rings for messages."""

from __future__ import annotations

import hashlib
import select
import threading
from collections.abc import Callable, Mapping, Sequence

import torch

from sagellm.core.protocols import (
    CommError,
    CommTimeoutError,
    ConfigError,
    PeerLostError,
)
from sagellm.core.protocols.process_group import (
    Position,
    RawCall,
    RawWork,
    SoloTransport,
    TorchObject,
    Transport,
)

from .arena import Arena
from .calls import CallQueue, FinishedWork
from .engine import CallRecord, Engine, EngineFailure, EngineTotals
from .engines import agree_engine, engine_factory
from .failures import Board, explain, late_ranks
from .flight import positions
from .forks import release_in_children
from .identity import polls_for, usable_cpus
from .meeting import Met, meet
from .p2p import Messages
from .rings import Ring, segment_words
from .settings import ShmSettings, facts_of, plan_layout

__all__ = ["ShmTransport", "form_transport"]

_CLOSE_S = 5.0
FORKED = (
    "this process is a forked child: a group belongs to the process that made it; "
    "make a new one here, or start the child with spawn"
)


class ShmTransport(Transport):
    """Primitive calls of one group whose ranks share a segment; `form_transport` makes it.

    Attributes:
        engine: Runs collectives in the calling thread.
        closed_by_fork: Whether this is a forked child's copy, which can do nothing.

    """

    def __init__(
        self,
        met: Met,
        engine: Engine,
        rank: int,
        *,
        name: str,
        global_ranks: Sequence[int],
        store: TorchObject,
        settings: ShmSettings,
        polls: int,
    ) -> None:
        self.engine = engine
        self.settings = settings
        self.forked = False
        self.on_change: Callable[[bool], None] = lambda busy: None
        self._met = met
        self._rank, self._size = rank, len(met.claims)
        self._name = name
        self._global_ranks = tuple(global_ranks)
        self._store = store
        self._board = Board(met.segment.memory, met.segment.layout, rank, global_ranks)
        self.arena = Arena(met.segment, rank)
        self._messages = Messages(
            _rings(met, rank),
            health=self._health,
            who=self._board.who,
            polls=polls,
            name=f"sagellm-comm-shm-p2p-{name}",
        )
        self._totals: Sequence[EngineTotals] | None = None
        self._records: Sequence[CallRecord] | None = None
        self._queue: CallQueue | None = None
        self._lock = threading.Lock()
        self._closed = False
        release_in_children(self)

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._size

    @property
    def global_ranks(self) -> tuple[int, ...]:
        return self._global_ranks

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def group_name(self) -> str:
        return self._name

    @property
    def busy(self) -> bool:
        """Whether calls wait in the queue, so that a new one has to go behind them."""
        return self._queue is not None and self._queue.busy

    def issue(self, call: RawCall) -> RawWork:
        if call.op in ("send", "recv"):
            return self._messages.issue([call])[0]
        if call.background or self.busy:
            return self._in_background(call)
        try:
            self.run(call)
        except EngineFailure as e:
            return FinishedWork(e)
        return FinishedWork()

    def issue_batch(self, calls: Sequence[RawCall]) -> list[RawWork]:
        return self._messages.issue(calls)

    def sender_of(self, tag: int) -> int | None:
        """A peer that has sent a message with this tag for which no receive was posted."""
        return self._messages.sender_of(tag)

    def run(self, call: RawCall) -> None:
        """Run a collective here and now; an interrupt ends the group: its ranks are apart then."""
        try:
            self.engine.run(call)
        except EngineFailure:
            raise
        except BaseException as e:
            self.abort(f"{type(e).__name__} in {call.describe or call.op}")
            raise

    def totals(self) -> Sequence[EngineTotals]:
        """The engine's counts; after `close` those of its end."""
        with self._lock:
            return self.engine.totals() if self._totals is None else self._totals

    def records(self) -> Sequence[CallRecord]:
        """The engine's last calls; after `close` those of its end."""
        with self._lock:
            return self.engine.records() if self._records is None else self._records

    def positions(self) -> dict[int, Position | None]:
        """Where every rank stands, this one included; empty where the segment is gone."""
        with self._lock:
            return {} if self._closed or self.forked else positions(self._board)

    def peer_positions(self) -> Mapping[int, Position | None]:
        found = self.positions()
        return found if any(found.values()) else {}

    def reset_statistics(self) -> None:
        """Start the engine's counts anew."""
        if not self._closed:
            self.engine.reset_totals()

    def _in_background(self, call: RawCall) -> RawWork:
        if self._queue is None:
            name = f"sagellm-comm-shm-{self._name}"
            self._queue = CallQueue(self.run, name, self._changed)
        return self._queue.put(call)

    def _changed(self, busy: bool) -> None:
        self.on_change(busy)

    def _health(self, peer: int) -> None:
        """Raise what a message to or from `peer` fails with, if it cannot arrive any more."""
        if self._closed or self.forked:
            raise ConfigError(FORKED if self.forked else f"group {self._name} is closed")
        poison = self._board.poison()
        if poison is not None:
            raise EngineFailure(*poison, self._board.step(self._rank))
        if peer in self.gone():
            raise EngineFailure("lost", peer, self._board.step(self._rank))

    def gone(self) -> list[int]:
        """The ranks whose connection has ended."""
        by_fd = {link.fileno(): peer for peer, link in self._met.links.items()}
        poller = select.poll()
        for fd in by_fd:
            poller.register(fd, select.POLLRDHUP)
        return sorted(by_fd[fd] for fd, _ in poller.poll(0) if fd in by_fd)

    def explain_failure(self, describe: str, error: Exception) -> Exception:
        if self._closed or self.forked:
            return error
        if not isinstance(error, EngineFailure):
            named = _renamed(error, describe)
            late = late_ranks(self._board) if isinstance(error, CommTimeoutError) else []
            if late and "no sign of rank" not in str(error):
                who = ", ".join(self._board.who(r) for r in late)
                named = CommTimeoutError(f"{describe}: no sign of rank {who}: {error}")
            self.engine.poison(_cause_of(error), str(named if late else error))
            return named
        told = explain(self._board, describe, error, self.gone)
        self.engine.poison(error.cause, _short(self._board, error))
        return told

    def abort(self, reason: str) -> None:
        with self._lock:
            if not self._closed and not self.forked:
                self.engine.poison("aborted", reason)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self.forked:
            return
        self.arena.close()
        self._messages.close()
        if self._queue is not None and not self._queue.close(_CLOSE_S):
            self.engine.poison("closed", "closed while calls were running")
            if not self._queue.close(_CLOSE_S):
                return  # a call that cannot be ended still uses the memory
        with self._lock:
            self._totals = self.engine.totals()
            self._records = self.engine.records()
        self.engine.close()
        self._met.close()

    def split(self, ranks: Sequence[int], name: str, timeout_s: float) -> Transport | None:
        if self.forked:
            raise ConfigError(FORKED)
        if self._rank not in ranks:
            return None
        chosen = [self._global_ranks[r] for r in ranks]
        if len(ranks) == 1:
            return SoloTransport(self.device, name, chosen[0])
        key = hashlib.sha256(repr(chosen).encode()).hexdigest()[:16]

        def watch() -> None:
            lost = sorted(set(self.gone()) & set(ranks))
            if lost:
                who = ", ".join(self._board.who(r) for r in lost)
                raise PeerLostError(
                    f"split of group {self._name}: lost rank {who}",
                    rank=list(ranks).index(lost[0]),
                )

        return form_transport(
            self._store,
            list(ranks).index(self._rank),
            len(ranks),
            name=name,
            label=f"{self._name}/{key}",
            global_ranks=chosen,
            timeout_s=timeout_s,
            settings=self.settings,
            watch=watch,
        )

    def after_fork(self) -> None:
        """In a child: close the connections, whose ends of file must mean the parent's."""
        self.forked = True
        self._lock = threading.Lock()
        self.arena.close()
        for link in self._met.links.values():
            link.close()


def form_transport(
    store: TorchObject,
    rank: int,
    size: int,
    *,
    name: str,
    label: str,
    global_ranks: Sequence[int],
    timeout_s: float,
    settings: ShmSettings,
    watch: Callable[[], None] | None = None,
) -> Transport:
    """Meet the other ranks and make an engine over the common segment. Collective."""
    if size == 1:
        return SoloTransport(torch.device("cpu"), name)
    try:
        met = meet(
            store,
            rank,
            size,
            label=label,
            timeout_s=timeout_s,
            facts=facts_of(settings),
            plan=plan_layout,
            watch=watch,
        )
    except CommError as e:
        if isinstance(e, PeerLostError) and e.rank is not None:
            e.rank = global_ranks[e.rank]
        raise _renamed(e, f"shm group {name} of {size} ranks (this is rank {rank})") from e
    polls = polls_for(size, usable_cpus(met.claims))
    try:
        chosen = agree_engine(settings.engine, {r: c["engines"] for r, c in enumerate(met.claims)})
        engine = engine_factory(chosen)(
            met.segment.memory,
            met.segment.layout,
            rank,
            {peer: link.fileno() for peer, link in met.links.items()},
            polls=polls,
            statistics=settings.statistics,
            algorithms=settings.overrides(),
        )
    except BaseException:
        met.close()
        raise
    return ShmTransport(
        met,
        engine,
        rank,
        name=name,
        global_ranks=global_ranks,
        store=store,
        settings=settings,
        polls=polls,
    )


def _rings(met: Met, rank: int) -> dict[int, tuple[Ring, Ring]]:
    memory, layout = met.segment.memory, met.segment.layout
    words = segment_words(memory)
    return {
        peer: (Ring(memory, words, layout, rank, peer), Ring(memory, words, layout, peer, rank))
        for peer in met.links
    }


def _cause_of(error: Exception) -> str:
    return "timeout" if isinstance(error, CommTimeoutError) else "error"


def _short(board: Board, failure: EngineFailure) -> str:
    if failure.cause in ("timeout", "lost"):
        return f"no sign of rank {board.who(failure.rank)}"
    return str(failure)


def _renamed(error: Exception, text: str) -> Exception:
    """The same kind of error, with the call in front."""
    if not isinstance(error, CommError) or isinstance(error, ConfigError):
        return error
    if isinstance(error, PeerLostError):
        return PeerLostError(f"{text}: {error}", rank=error.rank)
    return type(error)(f"{text}: {error}")
