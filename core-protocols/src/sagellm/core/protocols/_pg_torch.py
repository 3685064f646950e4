"""The transport over a torch process group: works, failure reports, deadlines on devices."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ._pg_failure import FailureBoard, classify
from ._pg_shim import (
    abort_group,
    group_facts,
    group_libraries,
    issue,
    make_group,
    span,
    world_is_initialized,
)
from ._pg_transport import RawCall, RawWork, TorchObject, Transport
from ._pg_watchdog import Watchdog
from .errors import CommError, CommTimeoutError, ConfigError, UnsupportedOperationError

__all__ = ["TorchTransport"]

_POINT_TO_POINT = frozenset({"send", "recv"})


class TorchTransport(Transport):
    """Primitive calls on one `torch.distributed.ProcessGroup`.

    Args:
        group: The group; never closed here unless `owned`.
        device: Where tensors live.
        timeout_s: The group's deadline, kept by the watchdog on devices.
        owned: Whether `close` destroys the group.

    """

    def __init__(
        self, group: TorchObject, device: torch.device, timeout_s: float, *, owned: bool = False
    ) -> None:
        self.group = group
        self._device = device
        self._timeout_s = timeout_s
        self._owned = owned
        self._rank, self._size = int(group.rank()), int(group.size())
        name, self._global_ranks, store = group_facts(group)
        self._name = name or f"group{id(group):x}"
        self._board = FailureBoard(store, self._rank, self._global_ranks)
        self._watchdog: Watchdog | None = None
        self.on_expired: Callable[[str], None] = lambda describe: None

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
        return self._device

    @property
    def group_name(self) -> str:
        return self._name

    @property
    def store(self) -> TorchObject:
        """The group's store, None when the group does not show one."""
        return self._board.store

    def issue(self, call: RawCall) -> RawWork:
        work = issue(self.group, call)
        if self._device.type == "cpu":
            return TorchWork(work, call.timeout_s, point_to_point=call.op in _POINT_TO_POINT)
        return self._on_device(work, call)

    def issue_batch(self, calls: Sequence[RawCall]) -> list[RawWork]:
        """Start sends and receives so that no order of them can deadlock."""
        if self._device.type == "cpu":
            works: dict[int, RawWork] = {}
            # gloo's sends and receives are both non-blocking; receives first saves a buffering.
            for call in sorted(calls, key=lambda c: c.op != "recv"):
                works[id(call)] = self.issue(call)
            return [works[id(call)] for call in calls]
        # Unverified on hardware: one NCCL group launch, as torch's batch_isend_irecv does.
        self.group._start_coalescing(self._device)
        for call in calls:
            issue(self.group, call)
        work = self.group._end_coalescing(self._device)
        return [self._on_device(work, call) for call in calls]

    def _on_device(self, work: TorchObject, call: RawCall) -> RawWork:
        """Unverified on hardware."""
        raw = DeviceWork(work, self._device)
        if not raw.captured:
            if self._watchdog is None:
                self._watchdog = Watchdog(self._name)
            self._watchdog.watch(raw.done, call.timeout_s, lambda: self.on_expired(call.describe))
        return raw

    def explain_failure(self, describe: str, error: Exception) -> Exception:
        kind = classify(error)
        self._board.post(kind, f"{describe}: {error}")
        self.abort(describe)
        return self._board.verdict(describe, kind, error)

    def abort(self, reason: str) -> None:
        self._board.post("aborted", reason)
        abort_group(self.group, self._device, self._rank, self._size)

    def close(self) -> None:
        if self._watchdog is not None:
            self._watchdog.close()
        if self._owned and world_is_initialized():
            self._owned = False
            torch.distributed.destroy_process_group(self.group)

    def split(self, ranks: Sequence[int], name: str, timeout_s: float) -> Transport | None:
        if not world_is_initialized():
            raise UnsupportedOperationError(
                f"group {self._name} is outside torch.distributed's default world; call "
                f"torch.distributed.init_process_group first, then split"
            )
        if self._rank not in ranks:
            return None
        library = group_libraries(self.group).get(self._device.type, "")
        try:
            group = make_group(self.group, ranks, library, timeout_s, name)
        except CommError:
            raise
        except Exception as e:  # torch reports a rank that never came in several classes
            members = [self._global_ranks[rank] for rank in ranks]
            text = f"group {name!r} of global ranks {members} not formed in {timeout_s} s: {e}"
            raise CommTimeoutError(text) from e
        return TorchTransport(group, self._device, timeout_s, owned=True)


class TorchWork(RawWork):
    """Torch's work on the CPU, with a wait that may end early and be repeated.

    A gloo send or receive knows that it is over only inside its own `wait`, whose timeout
    breaks the group; anything shorter than the deadline is therefore waited for by a thread,
    which is started at the first such question.
    """

    def __init__(self, work: TorchObject, timeout_s: float, *, point_to_point: bool) -> None:
        self._work = work
        self._deadline = time.monotonic() + timeout_s
        self._point_to_point = point_to_point
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    def wait(self, timeout_s: float) -> bool:
        if not self._over.is_set():
            if self._point_to_point:
                if not self._wait_point_to_point(timeout_s):
                    return False
            elif not self._wait_collective(timeout_s):
                return False
        if self._error is not None:
            raise self._error
        return True

    synchronize = wait

    def done(self) -> bool:
        if self._over.is_set():
            return True
        if not self._point_to_point:
            return bool(self._work.is_completed())
        self._start_thread()
        return self._over.is_set()

    def _wait_collective(self, timeout_s: float) -> bool:
        if timeout_s <= 0 and not self._work.is_completed():
            return False
        try:
            self._work.wait(span(timeout_s))
        except Exception as e:  # torch's own, or a vendor's
            if "Operation timed out" in str(e) and not self._work.is_completed():
                return False
            self._error = e
        self._over.set()
        return True

    def _wait_point_to_point(self, timeout_s: float) -> bool:
        final = time.monotonic() + timeout_s >= self._deadline - 0.002
        if not final or self._thread is not None:
            self._start_thread()
            return self._over.wait(max(0.0, timeout_s))
        if not self._lock.acquire(timeout=max(0.001, timeout_s)):
            return False
        try:
            self._block()
        finally:
            self._lock.release()
        return True

    def _start_thread(self) -> None:
        if not self._lock.acquire(blocking=False):
            return
        try:
            if self._thread is None and not self._over.is_set():
                self._thread = threading.Thread(
                    target=self._block, name="sagellm-comm-p2p", daemon=True
                )
                self._thread.start()
        finally:
            self._lock.release()

    def _block(self) -> None:
        if self._over.is_set():
            return
        try:
            self._work.wait(span(self._deadline - time.monotonic()))
        except Exception as e:  # kept for every later wait
            self._error = e
        self._over.set()


class DeviceWork(RawWork):
    """Torch's work on a device: `wait` orders the current stream. Unverified on hardware.

    While a graph is being captured the work is part of the graph: nothing asks it anything.
    """

    def __init__(self, work: TorchObject, device: torch.device) -> None:
        self._work = work
        self._device = device
        self._api: Any = getattr(torch, device.type, None)  # torch.cuda, torch.npu, …
        capturing = getattr(self._api, "is_current_stream_capturing", None)
        self.captured = bool(capturing is not None and capturing())

    def wait(self, timeout_s: float) -> bool:
        self._work.wait()
        return True

    def synchronize(self, timeout_s: float) -> bool:
        if self.captured:
            raise ConfigError("a captured call has no end of its own; synchronize after replay")
        end = time.monotonic() + timeout_s
        pause = 20e-6
        while not self._work.is_completed():
            if time.monotonic() >= end:
                return False
            time.sleep(pause)
            pause = min(pause * 2, 2e-3)
        self._work.wait()
        stream = getattr(self._api, "current_stream", None)
        if stream is not None:
            stream(self._device).synchronize()
        return True

    def done(self) -> bool:
        return bool(self._work.is_completed())
