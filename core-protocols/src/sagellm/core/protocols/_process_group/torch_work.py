"""Torch's works behind `RawWork`: waits that may end early, and polls that tell the truth."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from sagellm.core.protocols.errors import ConfigError

from .shim import span
from .transport import RawWork, TorchObject

__all__ = ["DeviceWork", "TorchWork"]


class TorchWork(RawWork):
    """Torch's work on the CPU, with a wait that may end early and be repeated.

    A gloo send or receive knows that it is over only inside its own `wait`, whose timeout
    breaks the group; anything shorter than the deadline is therefore waited for by a thread,
    which is started at the first such question.

    Args:
        work: Torch's.
        timeout_s: Its deadline, from now.
        point_to_point: Whether it is a send or a receive.
        finish: Run once, by the first wait that finds the work done.

    """

    def __init__(
        self,
        work: TorchObject,
        timeout_s: float,
        *,
        point_to_point: bool,
        finish: Callable[[], object] | None = None,
    ) -> None:
        self._work = work
        self._finish = finish
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
        if self._finish is not None:
            with self._lock:
                finish, self._finish = self._finish, None
                if finish is not None:
                    finish()
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
