"""Checks of collectives: values against numpy, over dtypes, reductions, sizes and strides."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sagellm.core.protocols.errors import ConfigError, UnsupportedOperationError

from .contract import Check, Skipped
from .ranks import DTYPES, REDUCE_OPS, Ranks, expect_equal, expect_raises, reduced, values

__all__ = ["checks"]

_SIZES = (1, 7, 1025)
_BITWISE = ("band", "bor", "bxor")


def _makes_sense(op: str, dtype: str) -> bool:
    floating = "float" in dtype
    if op == "avg":
        return floating
    return not (op in _BITWISE and floating)


def _all_reduce(op: str, dtype: str, r: Ranks) -> None:
    for n in _SIZES:
        expected = reduced(op, [values(k, n) for k in range(r.size)], dtype)
        given: list[torch.Tensor] = []

        def call(async_op: bool, n: int = n, given: list[torch.Tensor] = given) -> object:
            given.append(r.mine(n, dtype))
            return r.backend.all_reduce(given[-1], op, async_op=async_op)

        for what, result in r.each_way(call, "all_reduce", op, dtype):
            expect_equal(result, expected, f"{what} of {n} {dtype} by {op}")
            if result is not given[-1]:
                raise AssertionError(f"{what}: the result is not the tensor that was given")


def _all_reduce_shapes(r: Ranks) -> None:
    base = r.mine((6, 10))
    for what, x, shape in (
        ("transposed", base.clone().t(), (10, 6)),
        ("strided", base.clone()[:, ::2], (6, 5)),
    ):
        inputs = [values(k, (6, 10)) for k in range(r.size)]
        cut = [v.T if what == "transposed" else v[:, ::2] for v in inputs]
        r.attempt("all_reduce", call=partial(r.backend.all_reduce, x))
        expect_equal(x, reduced("sum", cut, "float32"), f"all_reduce of {what} {shape}")
    x = base.clone()
    part = x[:, ::2]
    before = x[:, 1::2].clone()
    r.backend.all_reduce(part)
    expect_equal(x[:, 1::2], before, "elements between those of a strided tensor")


def _empty(r: Ranks) -> None:
    """Empty tensors return at once on a rank, whatever the others do."""
    if r.rank == 0:
        x = r.mine(0)
        result = r.attempt("all_reduce", call=lambda: r.backend.all_reduce(x))
        if result is not x:
            raise AssertionError("all_reduce of an empty tensor did not return it")
        r.backend.all_reduce(x, async_op=True).wait(r.timeout_s)  # type: ignore[union-attr]  # a Work
        r.signal("empty")
    else:
        r.await_signal("empty", [0])
        r.attempt("all_reduce", call=lambda: r.backend.all_reduce(r.mine(0)))
    out = r.mine(0)
    r.backend.all_gather_into_tensor(out, r.mine(0))
    y = r.mine(3)
    r.backend.all_reduce(y)
    expect_equal(y, reduced("sum", [values(k, 3) for k in range(r.size)], "float32"), "afterwards")


def _zero_dim(r: Ranks) -> None:
    if not r.backend.capabilities.zero_dim:
        raise Skipped("capabilities.zero_dim is False")
    x = r.mine(()).clone()
    r.attempt("all_reduce", call=lambda: r.backend.all_reduce(x))
    inputs = [values(k, ()) for k in range(r.size)]
    expect_equal(x, reduced("sum", inputs, "float32"), "all_reduce of a 0-dimensional tensor")
    y = r.mine(()).clone()
    r.backend.broadcast(y, r.size - 1)
    expect_equal(y, inputs[-1], "broadcast of a 0-dimensional tensor")


def _all_gather_into(dtype: str, r: Ranks) -> None:
    for n in _SIZES:
        expected = np.concatenate([values(k, n) for k in range(r.size)])

        def call(async_op: bool, n: int = n) -> object:
            out = torch.zeros(r.size * n, dtype=getattr(torch, dtype), device=r.device)
            return r.backend.all_gather_into_tensor(out, r.mine(n, dtype), async_op=async_op)

        for what, result in r.each_way(call, "all_gather_into_tensor", dtype):
            expect_equal(result, _as(expected, dtype), f"{what} of {n} {dtype}")


def _as(x: NDArray[Any], dtype: str) -> NDArray[Any]:  # Any: any numbers
    return x.astype(bool) if dtype == "bool" else x


def _all_gather(r: Ranks) -> None:
    x = r.mine((3, 5))
    for what, result in r.each_way(
        lambda async_op: r.backend.all_gather(x, async_op=async_op), "all_gather"
    ):
        if len(result) != r.size:
            raise AssertionError(f"{what} gave {len(result)} tensors for {r.size} ranks")
        for k, y in enumerate(result):
            expect_equal(y, values(k, (3, 5)), f"{what}, part of rank {k}")
            y.add_(1)
        expect_equal(x, values(r.rank, (3, 5)), f"{what}: the input afterwards")


def _reduce_scatter_tensor(op: str, r: Ranks) -> None:
    for n in _SIZES:
        whole = reduced(op, [values(k, r.size * n) for k in range(r.size)], "float32")

        def call(async_op: bool, n: int = n) -> object:
            out = torch.zeros(n, device=r.device)
            return r.backend.reduce_scatter_tensor(out, r.mine(r.size * n), op, async_op=async_op)

        for what, result in r.each_way(call, "reduce_scatter_tensor", op):
            mine = whole[r.rank * n : (r.rank + 1) * n]
            expect_equal(result, mine, f"{what} of {n} by {op}")


def _reduce_scatter(r: Ranks) -> None:
    xs = [r.mine((2, 3), salt=k) for k in range(r.size)]
    expected = reduced("sum", [values(k, (2, 3), r.rank) for k in range(r.size)], "float32")
    for what, result in r.each_way(
        lambda async_op: r.backend.reduce_scatter(xs, async_op=async_op), "reduce_scatter"
    ):
        expect_equal(result, expected, what)
        for k, x in enumerate(xs):
            expect_equal(x, values(r.rank, (2, 3), k), f"{what}: input {k} afterwards")


def _all_to_all_single(r: Ranks) -> None:
    rows = 3
    inputs = [values(k, (r.size * rows, 2)) for k in range(r.size)]
    expected = np.concatenate([x[r.rank * rows : (r.rank + 1) * rows] for x in inputs])

    def call(async_op: bool) -> object:
        x = r.mine((r.size * rows, 2))
        return r.backend.all_to_all_single(torch.zeros_like(x), x, async_op=async_op)

    for what, result in r.each_way(call, "all_to_all_single"):
        expect_equal(result, expected, what)


def _all_to_all_uneven(r: Ranks) -> None:
    if not r.backend.capabilities.uneven:
        raise Skipped("capabilities.uneven is False")

    def rows(src: int, dst: int) -> int:
        return (src * 2 + dst + 1) % 4  # 0 among them

    def cut(src: int, dst: int) -> slice:
        first = sum(rows(src, k) for k in range(dst))
        return slice(first, first + rows(src, dst))

    totals = [sum(rows(k, d) for d in range(r.size)) for k in range(r.size)]
    inputs = [values(k, (totals[k], 2)) for k in range(r.size)]
    expected = np.concatenate([inputs[k][cut(k, r.rank)] for k in range(r.size)])
    out_splits = [rows(k, r.rank) for k in range(r.size)]
    in_splits = [rows(r.rank, k) for k in range(r.size)]

    def call(async_op: bool) -> object:
        out = torch.zeros((sum(out_splits), 2), device=r.device)
        x = r.mine((totals[r.rank], 2))
        return r.backend.all_to_all_single(out, x, out_splits, in_splits, async_op=async_op)

    for what, result in r.each_way(call, "all_to_all_single"):
        expect_equal(result, expected, f"uneven {what}")
    parts = [r.mine((totals[r.rank], 2))[cut(r.rank, k)] for k in range(r.size)]
    received = r.attempt("all_to_all", call=lambda: r.backend.all_to_all(parts))
    for k, y in enumerate(received):  # type: ignore[arg-type]  # not a Work: async_op is False
        expect_equal(y, inputs[k][cut(k, r.rank)], f"uneven all_to_all, part of rank {k}")


def _all_to_all(r: Ranks) -> None:
    xs = [r.mine((2, 3), salt=k) for k in range(r.size)]
    for what, result in r.each_way(
        lambda async_op: r.backend.all_to_all(xs, async_op=async_op), "all_to_all"
    ):
        for k, y in enumerate(result):
            expect_equal(y, values(k, (2, 3), r.rank), f"{what}, part of rank {k}")
        for k, x in enumerate(xs):
            expect_equal(x, values(r.rank, (2, 3), k), f"{what}: input {k} afterwards")


def _broadcast(dtype: str, r: Ranks) -> None:
    for src in range(r.size):
        for what, result in r.each_way(
            lambda async_op, src=src: r.backend.broadcast(  # type: ignore[misc]  # default binds src
                r.mine(7, dtype), src, async_op=async_op
            ),
            "broadcast",
            dtype,
        ):
            expect_equal(result, _as(values(src, 7), dtype), f"{what} of {dtype} from {src}")


def _reduce(r: Ranks) -> None:
    expected = reduced("sum", [values(k, 7) for k in range(r.size)], "float32")
    for dst in range(r.size):
        for what, result in r.each_way(
            lambda async_op, dst=dst: r.backend.reduce(r.mine(7), dst, async_op=async_op),  # type: ignore[misc]  # default binds dst
            "reduce",
        ):
            if r.rank == dst:
                expect_equal(result, expected, f"{what} to {dst}")


def _gather(r: Ranks) -> None:
    for dst in range(r.size):
        for what, result in r.each_way(
            lambda async_op, dst=dst: r.backend.gather(r.mine(5), dst, async_op=async_op),  # type: ignore[misc]  # default binds dst
            "gather",
        ):
            if r.rank != dst:
                if result is not None:
                    raise AssertionError(f"{what} to {dst} gave {result!r} on rank {r.rank}")
                continue
            for k, y in enumerate(result):
                expect_equal(y, values(k, 5), f"{what} to {dst}, part of rank {k}")


def _scatter(r: Ranks) -> None:
    for src in range(r.size):

        def call(async_op: bool, src: int = src) -> object:
            xs = [r.mine(5, salt=k) for k in range(r.size)] if r.rank == src else None
            return r.backend.scatter(torch.zeros(5, device=r.device), xs, src, async_op=async_op)

        for what, result in r.each_way(call, "scatter"):
            expect_equal(result, values(src, 5, r.rank), f"{what} from {src}")


def _bad_arguments(r: Ranks) -> None:
    """Each is refused before anything is sent, so that the group works on."""
    b, x = r.backend, r.mine(4)
    ints = r.mine(4, "int32")
    calls: list[tuple[str, Callable[[], object]]] = [
        ("an unknown reduction", lambda: b.all_reduce(x, "mean")),
        ("avg of integers", lambda: b.all_reduce(ints, "avg")),
        ("band of floats", lambda: b.all_reduce(x, "band")),
        ("a root outside the group", lambda: b.broadcast(x, r.size)),
        ("a negative root", lambda: b.reduce(x, -1)),
        ("a peer outside the group", lambda: b.send(x, r.size + 3)),
        ("an output of the wrong size", lambda: b.all_gather_into_tensor(r.mine(3), x)),
        ("an output of another dtype",
         lambda: b.all_gather_into_tensor(r.mine(4 * r.size, "int32"), x)),
        ("too few tensors", lambda: b.reduce_scatter([x] * (r.size + 1))),
        ("splits that do not add up",
         lambda: b.all_to_all_single(r.mine(4), x, [1] * r.size, [9] * r.size)),
        ("what is no tensor", lambda: b.all_reduce([1.0])),  # type: ignore[arg-type]  # on purpose
    ]  # fmt: skip
    for what, call in calls:
        error = expect_raises((ConfigError, UnsupportedOperationError), what, call)
        if not str(error):
            raise AssertionError(f"the error for {what} has no text")
    y = r.mine(4)
    b.all_reduce(y)
    expected = reduced("sum", [values(k, 4) for k in range(r.size)], "float32")
    expect_equal(y, expected, "all_reduce after refused arguments")


def checks() -> list[Check]:
    """The collectives' checks, in a stable order."""
    found = [
        Check(f"all_reduce[{op}-{dtype}]", partial(_all_reduce, op, dtype))
        for op in REDUCE_OPS
        for dtype in DTYPES
        if _makes_sense(op, dtype)
    ]
    found += [
        Check("all_reduce[non-contiguous]", _all_reduce_shapes),
        Check("all_reduce[empty]", _empty),
        Check("all_reduce[0-dim]", _zero_dim),
        Check("all_gather", _all_gather),
        Check("reduce_scatter", _reduce_scatter),
        Check("all_to_all", _all_to_all),
        Check("all_to_all_single[even]", _all_to_all_single),
        Check("all_to_all_single[uneven]", _all_to_all_uneven),
        Check("reduce", _reduce),
        Check("gather", _gather),
        Check("scatter", _scatter),
        Check("bad arguments are refused before anything is sent", _bad_arguments),
    ]
    for dtype in ("float32", "bfloat16", "int64", "bool"):
        found.append(Check(f"all_gather_into_tensor[{dtype}]", partial(_all_gather_into, dtype)))
        found.append(Check(f"broadcast[{dtype}]", partial(_broadcast, dtype)))
    for op in ("sum", "avg", "max"):
        found.append(Check(f"reduce_scatter_tensor[{op}]", partial(_reduce_scatter_tensor, op)))
    return found
