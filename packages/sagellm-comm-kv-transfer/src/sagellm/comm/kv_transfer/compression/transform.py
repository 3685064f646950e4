"""`transform`: a calibrated change of basis, then uniform quantisation of the components.

One step for all components is what reverse water-filling asks for: components that spread by
less than a step cost nothing, and all others err alike. The basis weighs channels first, so that
the step means the same for every layer's V and is finer for K.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sagellm.core.protocols import CodecSpec, ConfigError, IntegrityError

from .basis import LIMIT, Part
from .basis_store import BASES
from .codec import SectionCodec, narrowed
from .frame import Coding, Payload
from .generic import importable
from .layout import Geometry, Section
from .rope import RopeSpec, pairs_of, rotate
from .transform_code import LARGEST, decode_rows, encode_rows

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TRANSFORM", "TransformCodec", "turn_keys"]

_ROUND = 0.45  # codes are rounded towards zero a little: fewer bits for the same error


class TransformCodec(SectionCodec):
    """Codes components of a calibrated basis; sections span the layers that the basis joins.

    The error of a value, before K is rotated again and values are rounded to their dtype, is at
    most two steps, in units of the basis: every section is decoded on encode and compared, and
    `quant` codes one that is further off, not finite or unlike what was calibrated.
    `Basis.bound` gives that bound in standard deviations of the channel that is worst off.

    Args:
        basis: Fingerprint of a basis in `BASES`.
        step: From 1/64 to 4; the error grows with it, and its root mean square is 0.3 steps.

    """

    undoes_rope = True

    def __init__(self, basis: str, step: float = 0.25) -> None:
        if not 1 / 64 <= step <= 4:
            raise ConfigError(f"step {step:g} is not in 1/64..4")
        self._basis = BASES.get(basis)
        self._step = np.float32(step)
        self.join = self._basis.info.join
        self.fallbacks = (Coding("quant", {"step": min(max(step, 1 / 32), 2.0)}),)

    def check(self, geometry: Geometry) -> None:
        """Raise `LayoutMismatchError` for tensors of another model or geometry."""
        self._basis.check(geometry)

    def pack(self, x_THD: Tensor, section: Section) -> Payload | None:
        """Coded components; None for values that this basis does not describe."""
        import torch

        if not x_THD.is_floating_point() or not x_THD.numel():
            return None
        part = self._basis.part(section.kind, section.model_layer)
        x = x_THD.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if section.rope:
            turn_keys(x, section.rope, section.position, undo=True)
        z_TC = x.flatten(1).sub_(part.mean).mul_(part.weight)
        y_CT = part.matrix.T @ (z_TC / float(self._step)).T
        size = y_CT.abs()
        if not float(size.max()) < LARGEST:  # or not a number
            return None
        codes = size.add_(_ROUND).floor_().mul_(y_CT.sign_()).to(torch.int16).numpy()
        ratio = part.deviation / self._step
        if float((self._components(codes, ratio, part) - z_TC).abs().max()) > LIMIT * self._step:
            return None
        return encode_rows(codes, ratio)

    def unpack(self, payload: memoryview, out_THD: Tensor, section: Section) -> None:
        """Decode into `out_THD`."""
        tokens = out_THD.shape[0]
        part = self._basis.part(section.kind, section.model_layer)
        ratio = part.deviation / self._step
        if len(ratio) != out_THD[0].numel():
            raise IntegrityError(f"{out_THD[0].numel()} channels; the basis has {len(ratio)}")
        z_TC = self._components(decode_rows(payload, tokens, ratio), ratio, part)
        x = z_TC.div_(part.weight).add_(part.mean).view(out_THD.shape)
        if section.rope:
            turn_keys(x, section.rope, section.position, undo=False)
        out_THD.copy_(narrowed(x, out_THD.dtype))

    def _components(
        self, codes: NDArray[np.int16], ratio: NDArray[np.float32], part: Part
    ) -> Tensor:
        """Weighted channels [tokens, C] of the codes."""
        import torch

        y_CT = torch.from_numpy(codes).float()
        # within a step values crowd towards zero, the more so the larger the step
        inward = 0.1 * np.exp(-1.2 * np.maximum(ratio - np.float32(0.3), 0)) - 0.025
        y_CT.sub_(y_CT.sign().mul_(torch.from_numpy(inward).unsqueeze(1)))
        return (y_CT.mul_(float(self._step)).T @ part.matrix.T).contiguous()


def turn_keys(x_THD: Tensor, rope: RopeSpec, position: int, *, undo: bool) -> None:
    """Rotate float32 keys in place, contiguous, of consecutive tokens."""
    import torch

    pairs = pairs_of(x_THD, rope)
    before = pairs.contiguous()
    after, tables = torch.empty_like(before), torch.empty_like(before)
    rotate(before, after, tables, rope, position, undo=undo)
    pairs.copy_(after)


TRANSFORM = CodecSpec(
    "transform",
    False,
    importable("zstandard", "pip install zstandard"),
    lambda: TransformCodec,
    "pip install zstandard",
)
