"""Lanes on a device: streams and events. Unverified on hardware; importable without a device.

The caller's thread issues every task in the plan's order, so nothing depends on how threads are
scheduled and the whole may be captured in a device graph. Lanes wait for each other through
events, without a host synchronisation; a `Work` makes its lane's stream wait.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from sagellm.core.protocols import BackendUnavailableError, CommTimeoutError, ConfigError, TaskId

from ._values import Foreign
from .completion import StillRunning, is_handle, resolve
from .handle import PENDING, RUNNING, Run
from .scheduler import lane_kind

__all__ = ["StreamApi", "StreamFence", "StreamLanes"]

_POLL_S = 50e-6


class StreamApi(Protocol):
    """The part of `torch.cuda`, or of a vendor's module of the same form, that lanes use."""

    def is_available(self) -> bool: ...
    def Stream(self, *, priority: int = 0) -> Foreign: ...  # noqa: N802  # torch's name and type
    def Event(self, *, enable_timing: bool = False) -> Foreign: ...  # noqa: N802  # as above
    def current_stream(self) -> Foreign: ...  # a stream of the module
    def stream(self, stream: Foreign) -> AbstractContextManager[Any]: ...  # as above


def device_api(device_type: str) -> StreamApi:
    """The stream module of a device type.

    Raises:
        BackendUnavailableError: torch has no such module, or no device of it is usable.

    """
    api = getattr(torch, device_type, None)
    if api is None or not hasattr(api, "Stream") or not api.is_available():
        raise BackendUnavailableError(
            f"device {device_type!r} is not usable here: torch.{device_type} reports no device; "
            "install the vendor's torch build, or use device='cpu'"
        )
    return api  # type: ignore[no-any-return]  # a module in the form of the protocol


class StreamFence:
    """The end of a run on its lanes' streams."""

    def __init__(
        self,
        api: StreamApi,
        ends: list[Any],
        base: Foreign,
        timed: Mapping[TaskId, tuple[Any, Any]],  # events of the module
    ) -> None:
        self._api = api
        self._ends = ends
        self._base = base
        self._timed = timed

    def done(self) -> bool:
        """Whether every lane's stream is past the run. Never blocks."""
        return all(event.query() for event in self._ends)

    def wait(self, timeout_s: float) -> bool:
        """Order the current stream after the run, then poll until it is done or time is up."""
        current = self._api.current_stream()
        for event in self._ends:
            current.wait_event(event)
        deadline = time.monotonic() + timeout_s
        while not self.done():
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_S)
        return True

    def spans(self) -> list[tuple[TaskId, float, float]]:
        """Seconds since the run began, from timing events; empty unless the run was traced."""
        if self._base is None:
            return []
        return [
            (task, self._base.elapsed_time(start) / 1e3, self._base.elapsed_time(end) / 1e3)
            for task, (start, end) in self._timed.items()
        ]


class StreamLanes:
    """Streams by lane name, made at first use. Thread-safe: runs are issued one after another.

    Args:
        api: The module that has streams and events.
        timed: Take timing events around each task. They cost a little and, with
            CUDA_DEVICE_MAX_CONNECTIONS=1, keep streams from overlapping at all.
        on_broken: Called with a reason when an error left communications unissued.

    """

    def __init__(
        self,
        api: StreamApi,
        *,
        timed: bool = False,
        on_broken: Callable[[str], None] | None = None,
    ) -> None:
        self._api = api
        self._timed = timed
        self._on_broken = on_broken
        self._lock = threading.RLock()  # a task may schedule a run of its own
        self._closed = False
        self._streams: dict[str, Any] = {}  # streams of the module

    def add(self, name: str, stream: object = None, priority: int = 0) -> Foreign:
        """The lane's stream: the given one, the one it has, or a new one.

        torch wants low numbers for high priority; communication lanes get -1 unless told.
        """
        with self._lock:
            if stream is not None:
                self._streams[name] = stream
            elif name not in self._streams:
                urgent = -priority if priority else (-1 if lane_kind(name) == "comm" else 0)
                self._streams[name] = self._api.Stream(priority=urgent)
            return self._streams[name]

    def close(self, timeout_s: float) -> None:
        """Refuse new runs and wait until the device is through with those issued. Idempotent.

        Raises:
            CommTimeoutError: It was not, at the deadline.

        """
        with self._lock:
            self._closed = True
            ends = [self._recorded(stream) for stream in self._streams.values()]
            names = ", ".join(sorted(self._streams))
        if not StreamFence(self._api, ends, None, {}).wait(timeout_s):
            raise CommTimeoutError(
                f"close() gave up after {timeout_s:.3g} s: the device is not through with lanes "
                f"{names}"
            )

    def issue(self, run: Run) -> StreamFence:
        """Issue all tasks of a run on this thread, and return where it ends.

        What a task raises while it is issued fails the run; what it had issued runs on.

        Raises:
            ConfigError: The lanes are closed.

        """
        with self._lock:
            if self._closed:
                raise ConfigError("the overlap manager is closed; make another")
            return self._issue(run)

    def _issue(self, run: Run) -> StreamFence:
        origin = self._api.current_stream()
        streams = {lane: self.add(lane) for lane in run.plan.order}
        base = self._api.Event(enable_timing=self._timed)
        base.record(origin)
        for stream in streams.values():
            stream.wait_event(base)
        events: dict[TaskId, Any] = {}
        timed: dict[TaskId, tuple[Any, Any]] = {}
        for task in run.plan.sequence:
            with run.over:
                if run.state[task] != PENDING:
                    continue
                run.state[task] = RUNNING
            spec = run.plan.tasks[task]
            stream = streams[spec.lane]
            now = time.perf_counter() - run.begun
            try:
                with self._api.stream(stream):
                    for dep in run.shape.deps[task]:
                        if dep in events and run.plan.tasks[dep].lane != spec.lane:
                            stream.wait_event(events[dep])
                    start = self._recorded(stream) if self._timed else None
                    args = run.arguments(task)
                    for tensor in _tensors(args):
                        if tensor.device.type != "cpu":
                            tensor.record_stream(stream)
                    value = spec.fn(*args)
                    if is_handle(value):
                        value = self._resolved(run, task, value)
                    events[task] = self._recorded(stream)
            except BaseException as error:
                with run.over:
                    broken = run.fail(task, error, now, now)
                if broken and self._on_broken is not None:
                    why = f"overlap task {spec.name!r} failed: {type(error).__name__}: {error}"
                    self._on_broken(why)
                break
            timed[task] = (start, events[task])
            with run.over:
                run.finish(task, value, now, now)
        ends = [self._recorded(stream) for stream in streams.values()]
        return StreamFence(self._api, ends, base if self._timed else None, timed)

    def _recorded(self, stream: Foreign) -> Foreign:  # an event of the module
        event = self._api.Event(enable_timing=self._timed)
        event.record(stream)
        return event

    def _resolved(self, run: Run, task: TaskId, handle: Foreign) -> Foreign:  # the handle's result
        try:
            return resolve(handle, run.timeout_s)
        except StillRunning as error:
            spec = run.plan.tasks[task]
            raise CommTimeoutError(
                f"task {spec.name!r} on lane {spec.lane!r} was not done in {run.timeout_s:.3g} s"
            ) from error


def _tensors(values: Foreign) -> Iterator[torch.Tensor]:  # any nesting of lists and tuples
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
