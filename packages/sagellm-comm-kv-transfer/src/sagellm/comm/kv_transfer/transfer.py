"""The handle of one transfer."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from sagellm.core.protocols import (
    CommError,
    CommTimeoutError,
    ConfigError,
    KVBlock,
    KVTransferError,
    Progress,
    TransferKey,
    TransferMetrics,
    TransferState,
    UnsupportedOperationError,
)

from ._arguments import check_deadline
from ._turn import Gate, Seat
from .memory import Ints
from .state import RULES, TABLE, Event, Phase, Role, Step

__all__ = ["TransferHandle", "Witness", "transfer_error"]

_KEPT_CHOICES = 8

_ROLES = {"send": Role.SEND, "receive": Role.RECEIVE}
_GRACE_S = 10.0
"""How long past its deadline a transfer may take to end before `wait` gives up on it."""


class Witness:
    """Whether somebody has seen on a handle how its transfer ended; outlives the handle."""

    __slots__ = ("seen",)

    def __init__(self) -> None:
        self.seen = False


class TransferHandle:
    """One transfer; made by a channel. Thread-safe; dropping it cancels nothing."""

    # beginnings that are not written with every transfer: a small one takes microseconds
    num_tokens = 0
    """Tokens that the blocks hold, as their sender has said; 0 where it has not."""
    codec = ""
    """What codes its bytes just now; empty where nothing is to be coded."""
    owner: object = None
    seat: Seat | None = None
    """Where whoever waits may read it himself."""
    _over = False
    _phase = Phase.OFFERED
    _expired = False
    _error: KVTransferError | None = None
    _blocks: tuple[KVBlock, ...] = ()
    _totals = (0, 0, 0)
    _bytes_done = 0
    _blocks_done = 0
    _first: float | None = None
    _last: float | None = None

    def __init__(
        self,
        key: TransferKey,
        direction: Literal["send", "receive"],
        deadline_s: float,
        cancel: Callable[[TransferHandle], bool],
        role: Role | None = None,
    ) -> None:
        self._key = key
        self.direction = direction
        self.witness = Witness()
        self.started = time.monotonic()
        self.deadline = self.started + deadline_s
        self.deadline_s = deadline_s
        self._cancel = cancel
        self._lock = threading.Lock()
        self._gates: list[tuple[int | None, Gate]] = []
        self._steps = TABLE[role or _ROLES[direction]]
        self._callbacks: list[Callable[[], object]] = []
        self._layers: set[int] = set()
        self._meter = _Meter()
        self._choices: deque[str] = deque(maxlen=_KEPT_CHOICES)

    def __repr__(self) -> str:
        return f"<{self.direction} {self._key.id}/{self._key.attempt} {self.state.value}>"

    # -- what callers see -------------------------------------------------------------------

    @property
    def key(self) -> TransferKey:
        """Its name on every side; of a `receive(None)` only once it has met its push."""
        return self._key

    @property
    def state(self) -> TransferState:
        """Where it is now."""
        return RULES[self._phase].state

    @property
    def progress(self) -> Progress:
        """How much is in place and verified; on the sender, how much has been sent."""
        with self._lock:
            total, blocks, layers = self._totals
            return Progress(
                min(self._bytes_done, total),
                total,
                min(self._blocks_done, blocks),
                blocks,
                len(self._layers),
                layers,
            )

    @property
    def metrics(self) -> TransferMetrics:
        """What it has cost so far."""
        with self._lock:
            m, first = self._meter, self._first
            return TransferMetrics(
                bytes=self._bytes_done,
                wire_bytes=m.wire_bytes,
                runs=m.runs,
                syscalls=m.syscalls,
                queue_s=(first or time.monotonic()) - self.started,
                wire_s=(self._last or first or 0.0) - (first or 0.0),
                verify_s=m.verify_s,
                codec_s=m.codec_s,
                path=m.path,
                codec=self.codec,
                retries=m.retries,
            )

    def explain(self) -> str:
        """How it goes and why its bytes are coded as they are, in words."""
        m = self.metrics
        how = f"{self.direction} {self._key.id}/{self._key.attempt} by {m.path or 'no path yet'}"
        sizes = f"{m.bytes} bytes as {m.wire_bytes} on the wire, {m.codec_s:.3g} s in codecs"
        with self._lock:
            choices = "; then ".join(self._choices)
        return f"{how}: {sizes}; {choices or 'not coded: no codec was asked for'}"

    @property
    def blocks(self) -> Sequence[KVBlock]:
        """Received bounce buffers of a `receive` without destinations, once it has landed."""
        return self._blocks if self._landed else ()

    def wait(self, timeout_s: float | None = None) -> TransferHandle:
        """Block until it has landed, and return it.

        Args:
            timeout_s: Longest wait in seconds; None waits for its end, which comes by its
                deadline, and gives up 10 s after that.

        Raises:
            KVTransferError: It failed or was cancelled.
            CommTimeoutError: Still in flight after `timeout_s`; the transfer goes on.

        """
        self._wait_for(None, timeout_s, "it has not landed")
        self.witness.seen = True
        if self._error is not None:
            raise _fresh(self._error)
        return self

    def wait_layer(self, index: int, timeout_s: float | None = None) -> None:
        """Block until one layer is in place and verified.

        Raises:
            ConfigError: No such layer.
            KVTransferError: The transfer failed first.
            CommTimeoutError: Not there after `timeout_s`.

        """
        if index < 0 or (self._totals[2] and index >= self._totals[2]):
            raise ConfigError(f"layer {index} is not in 0..{self._totals[2] - 1}")
        self._wait_for(index, timeout_s, f"layer {index} is not there")
        if self._error is not None:
            raise _fresh(self._error)

    def done(self) -> bool:
        """Whether `wait` would return or raise at once."""
        return self._over

    def cancel(self) -> bool:
        """Ask both sides to give up; False when it was already over. Never blocks."""
        return self._cancel(self)

    def renew(self, ttl_s: float) -> bool:
        """Let an offer stand for at least so many seconds from now; False when it has ended.

        Never shortens it: to end an offer sooner, cancel it. Never blocks.

        Raises:
            UnsupportedOperationError: This is no offer: only those have leases.

        """
        check_deadline(ttl_s)
        if self._steps is not TABLE[Role.OFFER]:
            raise UnsupportedOperationError(f"{self!r} has a deadline and no lease to renew")
        with self._lock:
            if self._expired or not RULES[self._phase].moves:
                return False
            self.deadline = max(self.deadline, time.monotonic() + ttl_s)
            return True

    def exception(self) -> BaseException | None:
        """What it failed with; None while it runs and after success."""
        self.witness.seen |= self._over
        return self._error

    def outlast(self, timeout_s: float) -> None:
        """Block until it is over, however it ends.

        Raises:
            CommTimeoutError: Still in flight after `timeout_s`.

        """
        self._wait_for(None, timeout_s, "it has not ended")

    def __await__(self) -> Generator[Any, None, TransferHandle]:
        """Wait without blocking the running event loop, as long as `wait()`."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def settle() -> None:
            if not future.done():
                future.set_result(None)

        def over() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(settle)

        self._when_over(over)
        try:
            while not future.done():
                yield from asyncio.wait([future], timeout=self.left_s + _GRACE_S).__await__()
                if not self.left_s:  # an offer may have been renewed
                    break
        finally:
            self._forget(over)
        return self.wait(0.0)

    # -- what the channel does --------------------------------------------------------------

    @property
    def phase(self) -> Phase:
        """Where it is in the table."""
        return self._phase

    def awaits(self, event: Event) -> bool:
        """Whether the table has a row for this event now."""
        return event in self._steps.get(self._phase, ())

    @property
    def _landed(self) -> bool:
        return RULES[self._phase].landed

    def _wait_for(self, layer: int | None, timeout_s: float | None, what: str) -> None:
        """Wait until it is over, or a layer is there.

        Each waiter has a gate of its own, so that nobody is woken for nothing.
        """
        if self._over:
            return
        wait_s = self.left_s + _GRACE_S if timeout_s is None else max(0.0, timeout_s)
        gate, end = Gate(), time.monotonic() + wait_s
        entry = (layer, gate)
        with self._lock:
            if self._over or layer in self._layers:
                return
            self._gates.append(entry)
        try:
            if layer is None and (seat := self.seat) is not None:
                seat.read(gate, self.done, wait_s)
            while entry in self._gates:  # that alone says whether it is over
                if gate.wait(max(0.0, end - time.monotonic())):
                    continue
                if timeout_s is not None or not self.left_s:
                    break
                end = time.monotonic() + self.left_s + _GRACE_S  # renewed meanwhile
        finally:
            gate.rise()
            with self._lock:
                over = entry not in self._gates
                if not over:
                    self._gates.remove(entry)
        if over:
            return
        raise CommTimeoutError(
            f"transfer {self._key.id}/{self._key.attempt}: {what} after {wait_s:.3g} s; "
            f"it is {self.state.value}, {self.progress}"
        )

    def _when_over(self, callback: Callable[[], object]) -> None:
        with self._lock:
            if not self._over:
                self._callbacks.append(callback)
                return
        callback()

    def _forget(self, callback: Callable[[], object]) -> None:
        with self._lock:
            if callback in self._callbacks:
                self._callbacks.remove(callback)

    def bind(self, key: TransferKey) -> None:
        """Give a `receive(None)` its key."""
        self._key = key

    def expect(self, total_bytes: int, blocks: int, layers: int) -> None:
        """Set what progress is measured against."""
        with self._lock:
            self._totals = (total_bytes, blocks, layers)

    @property
    def left_s(self) -> float:
        """Seconds until its deadline, 0 when it has passed."""
        return max(0.0, self.deadline - time.monotonic())

    def expire(self) -> bool:
        """Whether its deadline has passed; from then on it cannot be renewed."""
        with self._lock:
            self._expired = not self.left_s
            return self._expired

    def take(
        self,
        event: Event,
        *,
        blocks: Sequence[KVBlock] = (),
        error: KVTransferError | None = None,
        first: Callable[[], object] | None = None,
    ) -> Step | None:
        """Go where the table leads; None when it has no row for this, and nothing happens.

        Args:
            event: What has happened.
            blocks: What was received, when that ends it.
            error: What it fails with, when that ends it.
            first: Called when that ends it, before anybody can see that; must not touch this
                handle.

        """
        with self._lock:
            step = self._steps[self._phase].get(event) if self._phase in self._steps else None
            if step is None:
                return None
            if self._over or not RULES[step.to].safe:
                self._phase = step.to
                return step
            try:
                if first is not None:
                    first()
            finally:  # a waiter who lands it may be interrupted: it must not end twice
                self._phase = step.to
                self._error, self._blocks = error, tuple(blocks)
                if self._landed:
                    self._layers.update(range(self._totals[2]))
                self._over = True
                self.seat = None
                self.owner = None  # which holds this handle, and its blocks with it
                callbacks, self._callbacks = self._callbacks, []
                gates, self._gates = self._gates, []
                for _, gate in gates:
                    gate.step_up()
        for _, gate in gates:
            gate.open()
        for callback in callbacks:
            callback()
        return step

    def moved(
        self,
        done_bytes: int,
        done_blocks: int,
        *,
        wire_bytes: int,
        runs: int,
        syscalls: int,
        verify_s: float,
        codec_s: float,
    ) -> None:
        """Count a frame."""
        now = time.monotonic()
        with self._lock:
            if self._phase in self._steps:
                step = self._steps[self._phase].get(Event.FRAME)
                self._phase = self._phase if step is None else step.to
            self._first = self._first or now
            self._last = now
            self._bytes_done += done_bytes
            self._blocks_done += done_blocks
            m = self._meter
            m.wire_bytes += wire_bytes
            m.runs += runs
            m.syscalls += syscalls
            m.verify_s += verify_s
            m.codec_s += codec_s

    def accepted(self, total_bytes: int, units: Sequence[int], path: str) -> None:
        """Both sides know what moves: so many units of each layer, by this path."""
        with self._lock:
            self._totals = (total_bytes, sum(units), len(units))
            self._meter.path = path
            if 0 in units:  # nothing to wait for
                self._layers.update(i for i, n in enumerate(units) if not n)
        if 0 in units:
            self.layers_done(())
        self.take(Event.ACCEPT)

    def retried(self, blocks: int) -> None:
        """Count blocks that were asked for again."""
        self._meter.retries += blocks

    def coded_as(self, name: str, why: str = "") -> None:
        """Note what codes its bytes from now on."""
        with self._lock:
            if name != self.codec:
                self.codec = name
                self._choices.append(why or name)

    def via(self, path: str) -> None:
        """Note how it goes."""
        self._meter.path = path

    def layers_done(self, indexes: Sequence[int]) -> None:
        """Wake who waits for these layers."""
        with self._lock:
            self._layers.update(indexes)
            if not self._gates:
                return
            opened = [g for g in self._gates if g[0] in self._layers]
            self._gates = [g for g in self._gates if g[0] not in self._layers]
        for _, gate in opened:
            gate.open()


class _Meter:
    """Costs of a transfer, under its handle's lock."""

    wire_bytes = runs = syscalls = retries = 0
    verify_s = codec_s = 0.0
    path = ""


def transfer_error(
    key: TransferKey, what: str, cause: BaseException, invalid: Mapping[str, Ints] | None = None
) -> KVTransferError:
    """The error a handle ends with, from what went wrong beneath."""
    by_group = {name: np.unique(ids) for name, ids in (invalid or {}).items() if len(ids)}
    every: list[int] = np.unique(np.concatenate([*by_group.values()])).tolist() if by_group else []
    if isinstance(cause, KVTransferError):
        code = cause.cause
    else:
        code = cause.code if isinstance(cause, CommError) else "kv_transfer_failed"
    error = KVTransferError(
        f"transfer {key.id}/{key.attempt} {what}: {cause}",
        key=(key.id, key.attempt),
        cause=code,
        invalid_blocks=every,
        invalid_by_group={name: tuple(ids.tolist()) for name, ids in by_group.items()},
    )
    error.__cause__ = cause
    return error


def _fresh(error: KVTransferError) -> KVTransferError:
    """A copy to raise, so that threads do not share one traceback."""
    copy = KVTransferError(
        str(error),
        key=error.key,
        cause=error.cause,
        invalid_blocks=error.invalid_blocks,
        invalid_by_group=error.invalid_by_group,
    )
    copy.__cause__ = error.__cause__
    return copy
