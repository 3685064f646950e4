"""Published schemes as baselines: round trips of K and V, with the bytes they take.

K and V are [layers, heads, tokens, head_dim] in bfloat16. Bytes include scales and tables; what
has an arithmetic coder gets the entropy of an ideal one, which favours it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from sagellm.comm.kv_transfer.compression.quality import Coder

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PEERS"]

One = Callable[["Tensor"], "tuple[Tensor, float]"]
CHUNK = 256


def _both(k_coder: One, v_coder: One) -> Coder:
    def round_trip(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, float]:
        (k2, k_bytes), (v2, v_bytes) = k_coder(k), v_coder(v)
        return k2, v2, k_bytes + v_bytes

    return round_trip


def _fp8(x: Tensor) -> tuple[Tensor, float]:
    """A cast with scale 1, as vLLM and LMCache do by default."""
    import torch

    return x.float().clamp(-448, 448).to(torch.float8_e4m3fn).bfloat16(), x.numel()


def _int8(x: Tensor) -> tuple[Tensor, float]:
    """One float16 scale per token and head."""
    scale = (x.float().abs().amax(-1, keepdim=True) / 127).half().float().clamp(min=1e-7)
    codes = (x.float() / scale).round().clamp(-127, 127)
    return (codes * scale).bfloat16(), x.numel() + 2 * scale.numel()


def _affine(x: Tensor, bits: int, axis: int, group: int) -> tuple[Tensor, float]:
    """Minimum and scale in float16 for groups along an axis, which may leave a shorter last one."""
    import torch

    moved = x.float().movedim(axis, -1)
    parts, nbytes = [], x.numel() * bits / 8
    for part in torch.split(moved, group, -1):
        low = part.amin(-1, keepdim=True).half().float()
        scale = ((part.amax(-1, keepdim=True) - low) / (2**bits - 1)).half().float()
        scale = scale.clamp(min=1e-7)
        codes = ((part - low) / scale).round().clamp(0, 2**bits - 1)
        parts.append(codes * scale + low)
        nbytes += 4 * scale.numel()
    return torch.cat(parts, -1).movedim(-1, axis).bfloat16(), nbytes


def _kivi(bits: int) -> Coder:
    """Groups of 32: K per channel along tokens, V per token along channels."""
    return _both(lambda k: _affine(k, bits, 2, 32), lambda v: _affine(v, bits, 3, 32))


@functools.cache
def _hadamard(dim: int) -> Tensor:
    import torch

    if dim & (dim - 1):
        return torch.eye(dim)
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = torch.randint(0, 2, (dim,), generator=torch.Generator().manual_seed(7)) * 2.0 - 1
    return matrix / math.sqrt(dim) * signs


@functools.cache
def _lloyd(bits: int) -> Tensor:
    """The best levels for a standard normal variable."""
    import torch

    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    levels = torch.linspace(-2.5, 2.5, 2**bits)
    for _ in range(60):
        nearest = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
        sums = torch.zeros_like(levels).index_add_(0, nearest, x)
        levels = sums / torch.bincount(nearest, minlength=2**bits)
    return levels


def _turboquant(x: Tensor) -> tuple[Tensor, float]:
    """Rotated, 4-bit levels of a normal distribution, the norm kept in float16."""
    import torch

    dim, levels = x.shape[-1], _lloyd(4)
    turned = x.float() @ _hadamard(dim).T
    norm = (turned.norm(dim=-1, keepdim=True) / math.sqrt(dim)).half().float().clamp(min=1e-6)
    q = levels[torch.bucketize(turned / norm, (levels[1:] + levels[:-1]) / 2)]
    q = q * (math.sqrt(dim) / q.norm(dim=-1, keepdim=True))
    return ((q * norm) @ _hadamard(dim)).bfloat16(), x.numel() / 2 + 2 * norm.numel()


def _entropy_bytes(rows: Tensor) -> float:
    """Bytes of an ideal coder that knows the distribution of each row's integers."""
    import torch

    codes = rows.flatten(0, -2).long()
    codes = codes - codes.min()
    counts = torch.zeros(codes.shape[0], int(codes.max()) + 1)
    counts.scatter_add_(1, codes, torch.ones(codes.shape))
    share = counts / codes.shape[1]
    return float(torch.special.entr(share).sum(1).sum() / math.log(2) * codes.shape[1] / 8)


def _cachegen_lmcache(x: Tensor, fine: float) -> tuple[Tensor, float]:
    """LMCache's: per token the maximum of all channels, 32 or 16 bins, tables in the payload.

    A table is 33 numbers of 16 bits per layer, channel and 256 tokens.
    """
    import torch

    layers, heads, tokens, dim = x.shape
    rows = x.float().transpose(1, 2).flatten(2)  # [layers, tokens, channels]
    many = max(1, round(layers * fine))
    out, nbytes = torch.empty_like(rows), 4.0 * layers * tokens
    for layer, row in enumerate(rows):
        levels = (32 if layer < many else 16) // 2 - 1
        largest = row.abs().amax(-1, keepdim=True).clamp(min=1e-12)
        codes = (row * (levels / largest)).round()
        out[layer] = codes / levels * largest
        for chunk in torch.split(codes, CHUNK):
            nbytes += _entropy_bytes(chunk.T) + 66 * chunk.shape[1]
    return out.view(layers, tokens, heads, dim).transpose(1, 2).bfloat16(), nbytes


def _cachegen_paper(x: Tensor, b: float = 0.25) -> tuple[Tensor, float]:
    """As published: 8-bit anchors of 10 tokens, differences in bins that grow with depth."""
    import torch

    layers, heads, tokens, dim = x.shape
    padded = torch.nn.functional.pad(x.float(), (0, 0, 0, -tokens % 10))
    groups = padded.view(layers, heads, -1, 10, dim)
    first = groups[:, :, :, :1]
    scale = (first.abs().amax((1, 4), keepdim=True) / 127).half().float().clamp(min=1e-6)
    anchor_codes = (first / scale).round()
    anchor = anchor_codes * scale
    rest = groups[:, :, :, 1:] - anchor
    depth = torch.arange(layers) * 3 // layers * 0.5 + 0.5
    step = b * depth.view(-1, 1, 1, 1, 1) * rest.std((1, 2, 3, 4), keepdim=True)
    codes = (rest / step).round()
    nbytes = 2.0 * scale.numel()
    for c in (anchor_codes, codes):
        nbytes += _entropy_bytes(c.permute(0, 1, 4, 2, 3).reshape(layers * heads * dim, -1))
    out = torch.cat([anchor, anchor + codes * step], 3).view(layers, heads, -1, dim)
    return out[:, :, :tokens].bfloat16(), nbytes


PEERS: dict[str, Coder] = {
    "int8 per token and head": _both(_int8, _int8),
    "fp8 e4m3": _both(_fp8, _fp8),
    "KIVI-4 g32": _kivi(4),
    "int4 g64": _both(lambda x: _affine(x, 4, 3, 64), lambda x: _affine(x, 4, 3, 64)),
    "TurboQuant-4": _both(_turboquant, _turboquant),
    "CacheGen as in LMCache": _both(
        lambda k: _cachegen_lmcache(k, 1 / 3), lambda v: _cachegen_lmcache(v, 1 / 16)
    ),
    "CacheGen as published, b = 0.25": _both(_cachegen_paper, _cachegen_paper),
    "KIVI-2 g32": _kivi(2),
}
