"""The transport over a torch process group: works, failure reports, deadlines on devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from sagellm.core.protocols.errors import (
    CommError,
    CommTimeoutError,
    UnsupportedOperationError,
)

from .failure import FailureBoard, classify
from .gloo import gloo_call
from .launch import GroupLaunch
from .shim import (
    abort_group,
    group_facts,
    group_libraries,
    issue,
    make_group,
    world_is_initialized,
)
from .torch_work import DeviceWork, TorchWork
from .transport import Position, RawCall, RawWork, TorchObject, Transport
from .watchdog import Watchdog

__all__ = ["TorchTransport"]

_POINT_TO_POINT = frozenset({"send", "recv"})
_ALONE = _POINT_TO_POINT | {"barrier"}
"""Calls that no launch of several takes."""


class TorchTransport(Transport):
    """Primitive calls on one `torch.distributed.ProcessGroup`.

    Args:
        group: The group; never closed here unless `owned`.
        device: Where tensors live.
        timeout_s: The group's deadline, kept by the watchdog on devices.
        owned: Whether `close` destroys the group.
        reports: Whether failures are told to the ranks and asked about over the group's store;
            False for a part of a larger group, which does so itself.

    """

    def __init__(
        self,
        group: TorchObject,
        device: torch.device,
        timeout_s: float,
        *,
        owned: bool = False,
        reports: bool = True,
    ) -> None:
        self.group = group
        self._device = device
        self._timeout_s = timeout_s
        self._owned = owned
        self._rank, self._size = int(group.rank()), int(group.size())
        name, self._global_ranks, store = group_facts(group)
        self._name = name or f"group{id(group):x}"
        self._store = store
        self._board = FailureBoard(store if reports else None, self._rank, self._global_ranks)
        self._is_gloo = group_libraries(group).get("cpu") == "gloo"
        self._watchdog: Watchdog | None = None
        self._launch: GroupLaunch | None = None  # of a running `coalesce`
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
        return self._store

    def issue(self, call: RawCall) -> RawWork:
        if self._device.type != "cpu":
            if self._launch is not None:
                if call.op not in _ALONE:
                    return self._launch.add(call)
                self._launch.flush()
            return self._on_device(issue(self.group, call), call)
        finish: Callable[[], object] | None = None
        if self._is_gloo:
            call, finish = gloo_call(call, self._rank, self._size)
        return TorchWork(
            issue(self.group, call),
            call.timeout_s,
            point_to_point=call.op in _POINT_TO_POINT,
            finish=finish,
        )

    def issue_batch(self, calls: Sequence[RawCall]) -> list[RawWork]:
        """Start sends and receives so that no order of them can deadlock."""
        if self._device.type == "cpu":
            works: dict[int, RawWork] = {}
            # gloo's sends and receives are both non-blocking; receives first saves a buffering.
            for call in sorted(calls, key=lambda c: c.op != "recv"):
                works[id(call)] = self.issue(call)
            return [works[id(call)] for call in calls]
        if self._launch is not None:
            self._launch.flush()
        # Unverified on hardware: one NCCL group launch, as torch's batch_isend_irecv does.
        self.group._start_coalescing(self._device)
        for call in calls:
            issue(self.group, call)
        work = self.group._end_coalescing(self._device)
        return [self._on_device(work, call) for call in calls]

    def start_coalescing(self) -> None:
        """On a device: gather collectives for one launch, where torch's group can."""
        if self._device.type != "cpu" and hasattr(self.group, "_start_coalescing"):
            self._launch = GroupLaunch(self.group, self._device, self._on_device)

    def end_coalescing(self) -> None:
        """Make the launch."""
        launch, self._launch = self._launch, None
        if launch is not None:
            launch.flush()

    def _on_device(self, work: TorchObject, call: RawCall) -> RawWork:
        """Unverified on hardware."""
        raw = DeviceWork(work, self._device)
        if not raw.captured:
            if self._watchdog is None:
                self._watchdog = Watchdog(self._name)
            self._watchdog.watch(raw.done, call.timeout_s, lambda: self.on_expired(call.describe))
        return raw

    def attach(self, position: Callable[[], Position | None]) -> None:
        self._board.position = position

    def peer_positions(self) -> Mapping[int, Position | None]:
        return self._board.positions

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

    def split(
        self, ranks: Sequence[int], name: str, timeout_s: float, *, reports: bool = True
    ) -> TorchTransport | None:
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
        return TorchTransport(group, self._device, timeout_s, owned=True, reports=reports)
