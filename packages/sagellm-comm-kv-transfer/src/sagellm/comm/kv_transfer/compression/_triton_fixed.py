"""Fixed-rate codes computed where the values are, on a GPU: the same bits as on the CPU.

Two kernels: one finds the scales of groups, one codes values; the second finds what the first one
read in the GPU's cache. `x` is contiguous, [tokens, channels] in memory; a group is `length`
consecutive values, or a channel's of `CHUNK_TOKENS` tokens. Divisions are rounded correctly and
products are not fused with sums, so that IEEE 754 settles every bit.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import CHUNK_TOKENS

__all__ = ["Code", "decode", "encode", "written"]

Code = Literal["fp8", "int8", "int4"]
_TOPS = {"fp8": 448.0, "int8": 127.0, "int4": 15.0}
_KINDS = {"fp8": 0, "int8": 1, "int4": 2}
_BLOCK = 1024
_PLAIN = (torch.float32, torch.float16, torch.bfloat16)


def written(dtype: torch.dtype) -> torch.dtype:
    """What `decode` writes where values of that type are wanted."""
    return dtype if dtype in _PLAIN else torch.float32


def encode(x: Tensor, code: Code, length: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Scales, minima and codes of values.

    Args:
        x: [tokens, channels], floats.
        code: Which codes.
        length: Values of a group; None: groups are the channels of `CHUNK_TOKENS` tokens.

    Returns:
        The bits of bfloat16 [groups] twice, the second unused but by int4, and bytes. The scale of
        a group that holds a value that is not finite is not finite either.

    """
    values = x.to(written(x.dtype)).contiguous()
    count, channels = values.numel(), values.shape[1]
    if length is None:
        rows = -(-values.shape[0] // CHUNK_TOKENS) * channels
        grid = (triton.cdiv(channels, 32), triton.cdiv(values.shape[0], CHUNK_TOKENS))
        step, low = (values.new_empty(rows, dtype=torch.int16) for _ in range(2))
        _scale_columns[grid](
            values, step, low, values.shape[0], channels, _TOPS[code],
            KIND=_KINDS[code], CHUNK=CHUNK_TOKENS, BLOCK=32, enable_fp_fusion=False,
        )  # fmt: skip
    else:
        rows = count // length
        wide = triton.next_power_of_2(length)
        many = max(1, 4096 // wide)
        step, low = (values.new_empty(rows, dtype=torch.int16) for _ in range(2))
        _scale_rows[(triton.cdiv(rows, many),)](
            values, step, low, rows, length, _TOPS[code],
            KIND=_KINDS[code], ROWS=many, WIDE=wide, enable_fp_fusion=False,
        )  # fmt: skip
    size = -(-count // 2) if code == "int4" else count
    codes = values.new_empty(size, dtype=torch.uint8)
    _encode[(triton.cdiv(size, _BLOCK),)](
        values, step, low, codes, count, size, channels, length or 1, _TOPS[code],
        KIND=_KINDS[code], CHUNK=0 if length else CHUNK_TOKENS, BLOCK=_BLOCK,
        enable_fp_fusion=False,
    )  # fmt: skip
    return step, low, codes


def decode(
    codes: Tensor, step: Tensor, low: Tensor, table: Tensor, out: Tensor, code: Code,
    length: int | None,
) -> None:  # fmt: skip
    """The inverse of `encode`.

    Args:
        codes: Bytes.
        step: The bits of bfloat16 [groups].
        low: The same.
        table: What the 256 codes of fp8 mean, float32.
        out: [tokens, channels], contiguous, of a dtype that kernels write.
        code: Which codes.
        length: As for `encode`.

    """
    size = codes.numel()
    rounds = out.dtype == torch.bfloat16
    most = torch.finfo(out.dtype).max
    _decode[(triton.cdiv(size, _BLOCK),)](
        codes, step, low, table, out.view(torch.int16) if rounds else out, out.numel(), size,
        out.shape[1], length or 1, most, KIND=_KINDS[code], CHUNK=0 if length else CHUNK_TOKENS,
        BLOCK=_BLOCK, ROUND=rounds, enable_fp_fusion=False,
    )  # fmt: skip


# What triton compiles has no annotations that it would not take for its own.


@triton.jit
def _rounded(v):
    """The bits of the nearest bfloat16, ties to even; triton's interpreter would cut them off."""
    bits = v.to(tl.int32, bitcast=True)
    near = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(v != v, 0x7FC0, near)


@triton.jit
def _float(bits):
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _scales(largest, smallest, step, low, at, mask, top, KIND: tl.constexpr):
    tiny = 1.1754943508222875e-38  # 2**-126
    if KIND == 2:
        below = _rounded(smallest - tl.abs(smallest) * 0.00390625 + 0.0)
        tl.store(low + at, below.to(tl.int16), mask)
        spread = tl.div_rn(largest - _float(below), top)
    else:
        spread = tl.div_rn(tl.maximum(largest, -smallest), top)
    tl.store(step + at, _rounded(tl.where(spread < tiny, tiny, spread)).to(tl.int16), mask)


@triton.jit
def _scale_rows(
    x, step, low, rows, length, top, KIND: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDE)
    held = (row < rows)[:, None] & (column < length)[None, :]
    v = tl.load(x + row[:, None] * length + column[None, :], held, 0.0).to(tl.float32)
    wild = (v != v) | (tl.abs(v) == float("inf"))
    largest = tl.max(tl.where(wild, float("inf"), tl.where(held, v, float("-inf"))), 1)
    smallest = tl.min(tl.where(wild, float("-inf"), tl.where(held, v, float("inf"))), 1)
    _scales(largest, smallest, step, low, row, row < rows, top, KIND)


@triton.jit
def _scale_columns(
    x,
    step,
    low,
    tokens,
    channels,
    top,
    KIND: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    held = (row < tokens)[:, None] & (column < channels)[None, :]
    v = tl.load(x + row[:, None] * channels + column[None, :], held, 0.0).to(tl.float32)
    wild = (v != v) | (tl.abs(v) == float("inf"))
    largest = tl.max(tl.where(wild, float("inf"), tl.where(held, v, float("-inf"))), 0)
    smallest = tl.min(tl.where(wild, float("-inf"), tl.where(held, v, float("inf"))), 0)
    at = tl.program_id(1) * channels + column
    _scales(largest, smallest, step, low, at, column < channels, top, KIND)


@triton.jit
def _group_of(at, channels, length, CHUNK: tl.constexpr):
    if CHUNK:
        return at // (CHUNK * channels) * channels + at % channels
    return at // length


@triton.jit
def _code_of(
    x, step, low, at, mask, channels, length, top, KIND: tl.constexpr, CHUNK: tl.constexpr
):
    group = _group_of(at, channels, length, CHUNK)
    v = tl.load(x + at, mask, 0.0).to(tl.float32)
    scale = _float(tl.load(step + group, mask, 16256))  # 1.0
    bottom = -top
    if KIND == 2:
        v = v - _float(tl.load(low + group, mask, 0))
        bottom = 0.0
    u = tl.div_rn(v, scale)
    u = tl.where(u > top, top, tl.where(u < bottom, bottom, u))
    if KIND != 0:
        return ((u + 12582912.0) - 12582912.0).to(tl.int32)  # to the nearest, ties to even
    bits = u.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    large = (size - 0x3C000000 + 0x7FFFF + ((size >> 20) & 1)) >> 20
    return tl.where(size < 0x3C800000, small, large) | ((bits >> 24) & 0x80)


@triton.jit
def _encode(
    x, step, low, codes, count, size, channels, length, top, KIND: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    code = _code_of(x, step, low, at, at < size, channels, length, top, KIND, CHUNK)
    if KIND == 2:
        held = at + size < count
        high = _code_of(x, step, low, at + size, held, channels, length, top, KIND, CHUNK)
        code = code | tl.where(held, high << 4, 0)
    tl.store(codes + at, (code & 255).to(tl.uint8), at < size)


@triton.jit
def _value_of(
    code, step, low, table, at, mask, channels, length, KIND: tl.constexpr, CHUNK: tl.constexpr
):
    group = _group_of(at, channels, length, CHUNK)
    scale = _float(tl.load(step + group, mask, 16256))  # 1.0
    if KIND == 0:
        return tl.load(table + code, mask, 0.0) * scale
    if KIND == 1:
        return tl.where(code > 127, code - 256, code).to(tl.float32) * scale
    return code.to(tl.float32) * scale + _float(tl.load(low + group, mask, 0))


@triton.jit
def _decode(
    codes, step, low, table, out, count, size, channels, length, most, KIND: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    held = at < size
    code = tl.load(codes + at, held, 0).to(tl.int32)
    first = code & 15 if KIND == 2 else code
    v = _value_of(first, step, low, table, at, held, channels, length, KIND, CHUNK)
    v = tl.minimum(tl.maximum(v, -most), most)
    v = _rounded(v).to(tl.int16) if ROUND else v.to(out.dtype.element_ty)
    tl.store(out + at, v, held)
    if KIND == 2:
        held = at + size < count
        v = _value_of(code >> 4, step, low, table, at + size, held, channels, length, KIND, CHUNK)
        v = tl.minimum(tl.maximum(v, -most), most)
        v = _rounded(v).to(tl.int16) if ROUND else v.to(out.dtype.element_ty)
        tl.store(out + at + size, v, held)
