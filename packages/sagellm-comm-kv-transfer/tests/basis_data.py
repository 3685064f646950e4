"""Made-up caches whose channels move together, and bases fitted on them."""

import torch
from codec_data import half, rotated

from sagellm.comm.kv_transfer.compression.basis import BasisInfo
from sagellm.comm.kv_transfer.compression.basis_fit import BasisFit
from sagellm.comm.kv_transfer.compression.basis_store import BASES

LAYERS, HEADS, DIM = 4, 2, 16
ROPE = half(DIM)


def correlated(tokens, seed, *, layers=LAYERS, heads=HEADS, dim=DIM, rope=ROPE, position=0):
    """[layers, 2, tokens, heads, dim]: a dozen causes move all layers' channels, and some noise."""
    model, text = torch.Generator().manual_seed(7), torch.Generator().manual_seed(seed)
    count = layers * 2 * heads * dim
    mix = torch.randn(12, count, generator=model) * torch.exp2(-torch.arange(12.0) / 3)[:, None]
    mean = torch.randn(count, generator=model)
    x = torch.randn(tokens, 12, generator=text) @ mix + mean
    x += 0.1 * torch.randn(tokens, count, generator=text)
    x = x.view(tokens, layers, 2, heads, dim).permute(1, 2, 0, 3, 4).contiguous()
    if rope:
        for layer in x:
            layer[0] = rotated(layer[0], rope, position)
    return x


def fitted(join=1, *, rope=ROPE, queries=False, model="m"):
    turned = (rope.inv_freq, rope.interleaved) if rope else ((), False)
    fit = BasisFit(BasisInfo(model, LAYERS, HEADS, DIM, join, "float32", "", 0, *turned))
    for seed in (100, 101, 102):
        x = correlated(400, seed, rope=rope)
        q = torch.randn(LAYERS, 400, 2 * HEADS, DIM, generator=torch.Generator().manual_seed(seed))
        fit.add(x[:, 0], x[:, 1], q if queries else None)
    return fit.finish("text")


def held_bases():
    """Fitted bases by how many layers they join, in the store for as long as the test needs."""
    found = {join: fitted(join) for join in (1, 2, LAYERS)}
    for basis in found.values():
        BASES.put(basis)
    yield found
    for basis in found.values():
        BASES.drop(basis.fingerprint)
