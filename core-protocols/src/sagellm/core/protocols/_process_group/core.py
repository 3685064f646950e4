"""What every tensor backend does around a call: order, hooks, counts, failure, groups."""

from __future__ import annotations

import contextlib
import logging
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sagellm.core.protocols.backend_spec import BackendSpec, Capabilities
from sagellm.core.protocols.comm_backend import CommBackendProtocol
from sagellm.core.protocols.comm_types import (
    Choice,
    Registration,
)
from sagellm.core.protocols.errors import CommError, ConfigError, DistributedRuntimeError
from sagellm.core.protocols.observe import ObserveSettings
from sagellm.core.protocols.topology import CostModelProtocol, CostTable, TopologyManagerProtocol
from sagellm.core.protocols.work import Work

from .checks import check_tensor
from .cost_table import table_by_broadcast
from .kv import KVReceive
from .lowering import Reductions, lower_call, refusal
from .recorder import NATIVE, Describer
from .running import After, Before, CallRunner, Started, TakeOver
from .transport import RawCall, Transport

__all__ = ["BackendCore", "Started"]

logger = logging.getLogger(__name__)


def _nothing() -> None:
    return None


class _NoRegistration:
    """What `register` gives where the transport needs none."""

    def release(self) -> None:
        """Do nothing."""


class BackendCore(CallRunner):
    """State of one group on this rank; `TensorBackend` adds the operations.

    With a `cost_model` in a group of several ranks, making one is collective: all ranks take
    rank 0's frozen table, unless they hold an agreed `cost_table` already.

    One thread at a time issues calls. Works may be waited for, and `abort` called, from any.
    """

    def __init__(
        self,
        spec: BackendSpec,
        transport: Transport,
        *,
        timeout_s: float = 30.0,
        topology_manager: TopologyManagerProtocol | None = None,
        cost_model: CostModelProtocol | None = None,
        cost_table: CostTable | None = None,
        observe: ObserveSettings | None = None,
    ) -> None:
        if not timeout_s > 0:
            raise ConfigError(f"timeout_s must be above 0, got {timeout_s}")
        self.spec = spec
        self.timeout_s = float(timeout_s)
        self.topology_manager = topology_manager
        self.cost_model = cost_model
        self._cost_table = cost_table
        if cost_model is not None and cost_table is None:
            frozen = cost_model.freeze()
            alone = transport.size == 1
            self._cost_table = frozen if alone else table_by_broadcast(transport, frozen, timeout_s)
        self._transport = transport
        # A group's identity does not change: properties of the protocol read these.
        self._rank, self._size = transport.rank, transport.size
        self._device = transport.device
        self._reductions = Reductions(spec)
        self._rules = {rule.when: rule for rule in spec.lowering}
        self._algorithms = {op: rule.rule for op, rule in self._rules.items()}
        self._algorithms |= dict.fromkeys(spec.capabilities.ops, NATIVE)
        self._on_device = self._device.type != "cpu"
        self._describe = Describer(transport.group_name, self._rank, self._size)
        self._observe(ObserveSettings.load() if observe is None else observe)
        transport.attach(self._recorder.position)
        self._in_flight = 0
        self._state = threading.RLock()
        self._dead: Exception | None = None
        self._closed = False
        self._before: list[Before] = []
        self._after: list[After] = []
        self._take_over: list[TakeOver] = []
        self._deferred: list[Work[Any]] | None = None  # works of a running `coalesce`
        self._background = False  # whether the call being issued is not waited for at once
        self._splits = 0
        self._kv_receives: dict[int, KVReceive] = {}  # the latest from each peer

    # -- who ------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._size

    @property
    def global_ranks(self) -> tuple[int, ...]:
        return self._transport.global_ranks

    @property
    def device_type(self) -> str:
        return self._device.type

    @property
    def device(self) -> torch.device:
        """Where the group's tensors live."""
        return self._device

    @property
    def capabilities(self) -> Capabilities:
        return self.spec.capabilities

    @property
    def process_group(self) -> torch.distributed.ProcessGroup | None:
        return None

    @property
    def group_name(self) -> str:
        """Name in messages and statistics."""
        return self._transport.group_name

    def _issue(self, method: str, call: RawCall) -> Started:
        """Start `call` as it is, or by the rule that the spec gives for `method`."""
        call.device = self._device
        call.background = self._background
        if method in self.spec.capabilities.ops:
            return [self._transport.issue(call)], _nothing
        lowered = lower_call(self.spec, self._rules[method].rule, call, self._rank, self._size)
        return [self._transport.issue(part) for part in lowered.calls], lowered.after

    def _offered(self, method: str) -> int:
        """How many rules `method` takes: 0 or 1.

        Raises:
            UnsupportedOperationError: Neither the backend nor a rule has it.

        """
        if method in self.spec.capabilities.ops:
            return 0
        rule = self._rules.get(method)
        if rule is None or rule.rule == "refuse":
            raise refusal(self.spec, method, self._rules)
        return 1

    # -- checks ---------------------------------------------------------------------------

    def _check_move(self, x: Tensor) -> None:
        allowed = self.spec.capabilities.move_dtypes
        name = str(x.dtype).removeprefix("torch.")
        if allowed and name not in allowed:
            raise refusal(self.spec, name, self._rules)

    def _check_parts(self, what: str, xs: Sequence[Tensor], *, even: bool) -> list[Tensor]:
        parts = list(xs)
        if len(parts) != self._size:
            raise ConfigError(
                f"{what} has {len(parts)} tensors; the group has {self._size} ranks, one each"
            )
        for i, x in enumerate(parts):
            check_tensor(f"{what}[{i}]", x, self._device.type)
            if x.dtype != parts[0].dtype:
                raise ConfigError(f"{what}[{i}] is {x.dtype}, {what}[0] is {parts[0].dtype}")
            if even and x.shape != parts[0].shape:
                raise ConfigError(
                    f"{what}[{i}] has shape {tuple(x.shape)}, {what}[0] {tuple(parts[0].shape)}; "
                    f"{self.name} takes equal shapes"
                )
        return parts

    # -- failure --------------------------------------------------------------------------

    def _declare_dead(self, text: str, error: Exception) -> Exception:
        """The first failure is explained and kept; later ones refer to it."""
        with self._state:
            if self._dead is None:
                self._dead = self._transport.explain_failure(text, error)
                logger.warning("group %s is dead: %s", self.group_name, self._dead)
                self._dump(str(self._dead))
                return self._dead
            return _again(text, self._dead)

    def _die(self, reason: str, error: Exception) -> None:
        with self._state:
            if self._dead is None:
                self._dead = error
                self._transport.abort(reason)
                self._dump(reason)

    def _expired(self, text: str) -> None:
        """A device work is late: called by the watchdog."""
        error = TimeoutError(f"timed out: not done within {self.timeout_s} s")
        self._declare_dead(text, error)

    def _unusable(self, op: str) -> Exception:
        if self._closed:
            return ConfigError(f"{op} on group {self.group_name}, which is closed")
        assert self._dead is not None
        return _again(f"{op} on group {self.group_name}", self._dead)

    def abort(self, reason: str) -> None:
        with self._state:
            if self._dead is not None or self._closed:
                return
            self._dead = DistributedRuntimeError(f"group {self.group_name} was aborted: {reason}")
        logger.warning("%s", self._dead)
        self._transport.abort(reason)
        self._dump(str(self._dead))

    def close(self) -> None:
        with self._state:
            if self._closed:
                return
            self._closed = True
        self._retire()
        self._transport.close()

    # -- the group ------------------------------------------------------------------------

    @abstractmethod
    def _wrap(self, transport: Transport) -> CommBackendProtocol:
        """A backend of the same kind over a transport made by `split`."""

    def split(self, ranks: Sequence[int], name: str | None = None) -> CommBackendProtocol | None:
        if self._closed:
            raise self._unusable("split")
        chosen = list(ranks)
        if not chosen or len(set(chosen)) != len(chosen):
            raise ConfigError(f"ranks {chosen} must be distinct and at least one")
        for rank in chosen:
            if not 0 <= rank < self._size:
                raise ConfigError(f"rank {rank} is not in 0..{self._size - 1}")
        label = name or f"{self.group_name}/{self._splits}"
        self._splits += 1
        transport = self._transport.split(chosen, label, self.timeout_s)
        return None if transport is None else self._wrap(transport)

    @contextlib.contextmanager
    def _coalescing(self) -> Iterator[None]:
        if self._deferred is not None:
            raise ConfigError("coalesce() is already running on this backend")
        self._deferred = []
        together = self.spec.capabilities.coalesce
        if together:
            self._transport.start_coalescing()
        try:
            yield
        finally:
            works, self._deferred = self._deferred, None
            if together:
                self._transport.end_coalescing()
            for work in works:
                work.wait()

    def coalesce(self) -> contextlib.AbstractContextManager[None]:
        return self._coalescing()

    # -- memory and steering --------------------------------------------------------------

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self._scratch(shape, dtype)

    def _scratch(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Ordinary memory for a result or a copy, whatever `empty` gives callers."""
        return torch.empty(tuple(shape), dtype=dtype, device=self._device)

    def register(self, x: Tensor) -> Registration:
        return _NoRegistration()

    def explain(self, op: str, nbytes: int) -> Choice:
        if op not in self.spec.capabilities.ops:
            self._offered(op)
            rule = self._rules[op]
            return Choice(self.name, rule.rule, f"{self.name} has no {op}: {rule.why}")
        if self.cost_model is None or self._cost_table is None:
            reason = f"{self.name} chooses its own algorithm; no cost model was given"
            return Choice(self.name, "native", reason)
        algorithm, estimate = self.cost_model.select(self._cost_table, op, nbytes, self._size)
        reason = (
            f"cost model {self._cost_table.fingerprint} expects {estimate.time_us:.1f} us "
            f"for {nbytes} bytes over {self._size} ranks ({estimate.basis})"
        )
        return Choice(self.name, algorithm, reason, estimate.time_us)

    def add_hook(
        self,
        *,
        before: Before | None = None,
        after: After | None = None,
        take_over: TakeOver | None = None,
    ) -> Callable[[], None]:
        # Lists are replaced, never changed: a call in progress keeps the hooks it began with.
        if before is not None:
            self._before = [*self._before, before]
        if after is not None:
            self._after = [*self._after, after]
        if take_over is not None:
            self._take_over = [*self._take_over, take_over]

        def remove() -> None:
            self._before = [h for h in self._before if h is not before]
            self._after = [h for h in self._after if h is not after]
            self._take_over = [h for h in self._take_over if h is not take_over]

        return remove


def _again(text: str, first: Exception) -> Exception:
    """An error of the same kind as the one that killed the group."""
    message = f"{text}: the group is dead since: {first}"
    if isinstance(first, CommError):
        with contextlib.suppress(TypeError):
            again = type(first)(message)
            for attribute in ("rank", "calls"):
                if hasattr(first, attribute):
                    setattr(again, attribute, getattr(first, attribute))
            return again
    return DistributedRuntimeError(message)
