"""Whether keys look as if they had been rotated as their layout says.

Before RoPE a channel of K has a mean; rotation spreads it. Undoing the right rotation therefore
leaves less spread about the means than any wrong one, which decodes just as well and compresses
worse: nobody would notice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sagellm.core.protocols import ConfigError

from .layout import CHUNK_TOKENS, Geometry
from .rope import RopeSpec, pairs_of, rotate

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["check_rope"]

_LAYERS = 4
_FEWEST = 64  # tokens from which a spread can be told
_CLEARLY = 0.03  # bits per value; a wrong convention costs 0.05 to 0.2, and noise 0.01


def check_rope(geometry: Geometry, view: Tensor) -> bool:
    """Compare the layout's convention with the other pairing and with no RoPE at all.

    Args:
        geometry: Of the tensor.
        view: Its canonical view.

    Returns:
        Whether there were keys enough, and finite ones, to tell by.

    Raises:
        ConfigError: Another convention clearly fits the keys better.

    """
    rope = geometry.layout.rope
    if rope is None or not geometry.sections:
        return False
    step = max(1, geometry.layers // _LAYERS)
    found = (_sample(geometry, view, layer) for layer in range(0, geometry.layers, step))
    keys = [x for x in found if x is not None]
    position = geometry.layout.first_position

    def bits(spec: RopeSpec | None, *, swapped: bool = False) -> float:
        turned = [x.transpose(0, 1)[:CHUNK_TOKENS] if swapped else x for x in keys]
        return sum(_bits(x, spec, position) for x in turned) / len(turned)

    if (
        keys
        and geometry.heads >= _FEWEST
        and bits(rope, swapped=True) < bits(None, swapped=True) - _CLEARLY
    ):
        raise ConfigError(
            f"RoPE turns the {geometry.heads} heads as if they were tokens: the axes "
            f"{geometry.layout.axes} seem to be in the wrong order"
        )
    if not keys or geometry.tokens < _FEWEST:
        return False
    other = RopeSpec(rope.inv_freq, not rope.interleaved)
    costs = {"as the layout says": bits(rope), _name(other): bits(other), "none": bits(None)}
    if min(costs.values()) < costs["as the layout says"] - _CLEARLY:
        listed = ", ".join(f"{name} {cost:.2f}" for name, cost in costs.items())
        raise ConfigError(
            f"keys contradict the layout's RoPE ({_name(rope)}): bits of spread per value are "
            f"{listed}; check the layout's axes and give RopeSpec the engine's convention, or None"
        )
    return True


def _name(rope: RopeSpec) -> str:
    return "interleaved pairs" if rope.interleaved else "half-split pairs"


def _sample(geometry: Geometry, view: Tensor, layer: int) -> Tensor | None:
    """The first keys of a layer in float32, [tokens, heads, dim]; None where there are none."""
    section = geometry.section(layer * geometry.kvs * geometry.per_part)
    if section.kind != "k" or not view.is_floating_point():
        return None
    rows = [
        piece.float().cpu().reshape(-1, geometry.heads, geometry.dim)[:CHUNK_TOKENS]
        for first, _, piece in geometry.pieces(view, section)
        if first < CHUNK_TOKENS
    ]
    import torch

    x = torch.cat(rows)[:CHUNK_TOKENS]
    return x if bool(torch.isfinite(x).all()) else None


def _bits(x_THD: Tensor, rope: RopeSpec | None, position: int) -> float:
    """Mean of log2 of the channels' deviations."""
    import torch

    z = x_THD
    if rope is not None:
        turned = pairs_of(x_THD, rope).contiguous()
        z = torch.empty_like(turned)
        rotate(turned, z, torch.empty_like(turned), rope, position, undo=True)
        z = torch.cat([z.permute(1, 2, 3, 0).flatten(2), x_THD[..., rope.dim :]], 2)
    centred = z - z.mean(0)
    return float((centred.square().mean(0) + 2.0**-60).log2().mean()) / 2
