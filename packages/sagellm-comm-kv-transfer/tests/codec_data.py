"""Tensors that look like a KV cache, for the tests of codecs."""

import torch

from sagellm.comm.kv_transfer.compression import RopeSpec, TensorLayout, codec_names
from sagellm.comm.kv_transfer.compression.rope import pairs_of, rotate

CODECS = tuple(n for n in codec_names() if n != "transform")  # which needs a basis: its own tests
AXES = ("layer", "kv", "token", "head", "dim")


def rotated(x_THD, rope, position=0):
    """Keys as a model with that RoPE caches them."""
    out = x_THD.clone()
    pairs = pairs_of(x_THD, rope).contiguous()
    turned = torch.empty_like(pairs)
    rotate(pairs, turned, torch.empty_like(pairs), rope, position, undo=False)
    pairs_of(out, rope).copy_(turned)
    return out


def cache(
    layers=2, tokens=300, heads=2, dim=16, rope=None, position=0, dtype=torch.bfloat16, seed=0
):
    """[layers, 2, tokens, heads, dim]: channels with means and spreads of their own."""
    random = torch.Generator().manual_seed(seed)
    spread = torch.exp(torch.randn(layers, 2, 1, heads, dim, generator=random) / 2)
    mean = 2 * torch.randn(layers, 2, 1, heads, dim, generator=random)
    x = mean + spread * torch.randn(layers, 2, tokens, heads, dim, generator=random)
    if rope:
        for layer in range(layers):
            x[layer, 0] = rotated(x[layer, 0], rope, position)
    return x.to(dtype)


def layout(**fields):
    return TensorLayout(**{"axes": AXES, **fields})


def half(dim=16, **options):
    return RopeSpec.of(dim, **options)


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )
