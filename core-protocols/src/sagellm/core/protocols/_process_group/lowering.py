"""The documented rules that turn what a library lacks into what it has.

Reductions: `avg_as_sum_div` sums and divides; `via_int32`, `via_int64`, `via_float32` and
`via_float64` reduce a wider copy and cast back (integers wrap as the narrow dtype would).
Operations: the rules of `CALL_RULES`. `refuse` refuses by name, giving the spec's reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sagellm.core.protocols.backend_spec import BackendSpec, Lowering
from sagellm.core.protocols.comm_types import ReduceOp
from sagellm.core.protocols.errors import ConfigError, UnsupportedOperationError

from .shim import dtype_name
from .transport import RawCall

__all__ = ["CALL_RULES", "Lowered", "ReductionPlan", "Reductions", "lower_call", "refusal"]

_WIDE = {
    "via_int32": torch.int32,
    "via_int64": torch.int64,
    "via_float32": torch.float32,
    "via_float64": torch.float64,
}
_BITWISE = frozenset({ReduceOp.BAND, ReduceOp.BOR, ReduceOp.BXOR})


@dataclass(frozen=True, slots=True)
class ReductionPlan:
    """How a reduction is sent: the op and dtype on the wire, and how many rules that took."""

    op: ReduceOp
    dtype: torch.dtype
    divide: bool
    lowered: int


def refusal(spec: BackendSpec, what: str, rules: Mapping[str, Lowering]) -> Exception:
    """The error for something that neither the backend nor a rule can do."""
    why = f": {rules[what].why}" if what in rules else ""
    return UnsupportedOperationError(f"{spec.name} has no {what}{why}")


class Reductions:
    """Plans of one backend, made once per (op, dtype)."""

    def __init__(self, spec: BackendSpec) -> None:
        self._spec = spec
        self._rules = {rule.when: rule for rule in spec.lowering}
        self._plans: dict[tuple[ReduceOp, torch.dtype], ReductionPlan] = {}

    def plan(self, op: ReduceOp, dtype: torch.dtype) -> ReductionPlan:
        """The way to reduce `dtype` with `op`.

        Raises:
            ConfigError: The pair has no meaning, such as `avg` of integers.
            UnsupportedOperationError: No rule covers it.

        """
        found = self._plans.get((op, dtype))
        if found is None:
            found = self._plans[op, dtype] = self._make(op, dtype)
        return found

    def _make(self, op: ReduceOp, dtype: torch.dtype) -> ReductionPlan:
        floating = dtype.is_floating_point or dtype.is_complex
        if op is ReduceOp.AVG and not floating:
            raise ConfigError(f"avg needs a floating dtype, got {dtype_name(dtype)}")
        if op in _BITWISE and floating:
            raise ConfigError(f"{op} needs an integer or bool dtype, got {dtype_name(dtype)}")
        wire_op, divide, lowered = op, False, 0
        if op not in self._spec.capabilities.reduce_ops:
            rule = self._rules.get(op)
            if rule is None or rule.rule != "avg_as_sum_div":
                raise refusal(self._spec, op, self._rules)
            wire_op, divide, lowered = ReduceOp.SUM, True, 1
        name = dtype_name(dtype)
        wire_dtype = dtype
        if name not in self._spec.capabilities.dtypes:
            rule = self._rules.get(name)
            if rule is None or rule.rule not in _WIDE:
                raise refusal(self._spec, name, self._rules)
            wire_dtype, lowered = _WIDE[rule.rule], lowered + 1
        return ReductionPlan(wire_op, wire_dtype, divide, lowered)


@dataclass(slots=True)
class Lowered:
    """Primitive calls that stand for another, and what to do once they are done."""

    calls: list[RawCall]
    after: Callable[[], None]


def lower_call(spec: BackendSpec, rule: str, call: RawCall, rank: int, size: int) -> Lowered:
    """What `rule` makes of `call`.

    Raises:
        UnsupportedOperationError: There is no such rule.

    """
    make = CALL_RULES.get(rule)
    if make is None:
        known = ", ".join(sorted(CALL_RULES))
        raise UnsupportedOperationError(
            f"{spec.name} lowers {call.op} by {rule!r}, which is not one of {known}"
        )
    return make(call, rank, size)


def _copy_all(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for target, source in pairs:
        target.copy_(source.view_as(target))


def _gather_by_all_gather(call: RawCall, rank: int, size: int) -> Lowered:
    x = call.inputs[0]
    flat = torch.empty(size * x.numel(), dtype=x.dtype, device=x.device)
    pairs = list(zip(call.outputs, flat.chunk(size), strict=False))
    return Lowered(
        [replace(call, op="all_gather", inputs=[x.view(-1)], outputs=[flat], peer=None)],
        lambda: _copy_all(pairs),
    )


def _all_gather_by_broadcast(call: RawCall, rank: int, size: int) -> Lowered:
    chunks = list(call.outputs[0].view(-1).chunk(size))
    chunks[rank].copy_(call.inputs[0].view(-1))
    calls = [
        replace(call, op="broadcast", inputs=[], outputs=[chunk], peer=root)
        for root, chunk in enumerate(chunks)
    ]
    return Lowered(calls, lambda: None)


def _scatter_by_broadcast(call: RawCall, rank: int, size: int) -> Lowered:
    out = call.outputs[0]
    flat = torch.empty(size * out.numel(), dtype=out.dtype, device=out.device)
    if call.inputs:
        _copy_all(list(zip(flat.chunk(size), (x.view(-1) for x in call.inputs), strict=True)))
    ours = flat.chunk(size)[rank]
    return Lowered(
        [replace(call, op="broadcast", inputs=[], outputs=[flat])],
        lambda: _copy_all([(out, ours)]),
    )


def _reduce_by_all_reduce(call: RawCall, rank: int, size: int) -> Lowered:
    x = call.outputs[0]
    total = x.clone()
    pairs = [(x, total)] if rank == call.peer else []
    return Lowered(
        [replace(call, op="all_reduce", outputs=[total], peer=None)], lambda: _copy_all(pairs)
    )


def _reduce_scatter_by_all_reduce(call: RawCall, rank: int, size: int) -> Lowered:
    total = call.inputs[0].clone()
    ours = total.view(-1).chunk(size)[rank]
    return Lowered(
        [replace(call, op="all_reduce", inputs=[], outputs=[total])],
        lambda: _copy_all([(call.outputs[0], ours)]),
    )


def _all_to_all_by_all_gather(call: RawCall, rank: int, size: int) -> Lowered:
    x, out = call.inputs[0], call.outputs[0]
    if call.in_splits or call.out_splits:
        raise UnsupportedOperationError("all_to_all_by_all_gather needs even splits")
    flat = torch.empty(size * x.numel(), dtype=x.dtype, device=x.device)
    ours = [part.chunk(size)[rank] for part in flat.chunk(size)]
    pairs = list(zip(out.view(-1).chunk(size), ours, strict=True))
    return Lowered(
        [replace(call, op="all_gather", inputs=[x.view(-1)], outputs=[flat])],
        lambda: _copy_all(pairs),
    )


def _barrier_by_all_reduce(call: RawCall, rank: int, size: int) -> Lowered:
    device = "cpu" if call.device is None else call.device
    token = torch.zeros(1, dtype=torch.float32, device=device)
    return Lowered(
        [replace(call, op="all_reduce", outputs=[token], reduce_op=ReduceOp.SUM)], lambda: None
    )


CALL_RULES: dict[str, Callable[[RawCall, int, int], Lowered]] = {
    "all_to_all_by_all_gather": _all_to_all_by_all_gather,
    "barrier_by_all_reduce": _barrier_by_all_reduce,
    "gather_by_all_gather": _gather_by_all_gather,
    "list_all_gather_by_broadcast": _all_gather_by_broadcast,
    "reduce_by_all_reduce": _reduce_by_all_reduce,
    "reduce_scatter_by_all_reduce": _reduce_scatter_by_all_reduce,
    "scatter_by_broadcast": _scatter_by_broadcast,
}
"""Rules for whole operations, by name."""
