"""The codes of `quant` computed where the values are, on a GPU: in one pass, instead of five.

The product is not fused with the sum, so that the codes are those of the CPU for the same means
and scales. Means of a GPU may differ in the last bit, for it adds in another order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["quantise"]

_BLOCK = 1024


def quantise(z: Tensor, by: Tensor, add: Tensor, codes: Tensor, above: int) -> bool:
    """Write the integers below `z * by + add`; whether all lie from 1 to below `above`.

    Args:
        z: [.., tokens, channels], float32, contiguous.
        by: [.., 1, channels], contiguous.
        add: The same.
        codes: As many int8 as there are values.
        above: At most 256.

    """
    count = z.numel()
    beyond = z.new_zeros(1, dtype=torch.int32)
    _quantise[(triton.cdiv(count, _BLOCK),)](
        z, by, add, codes, beyond, z.shape[1] * z.shape[2], z.shape[2], count, above,
        BLOCK=_BLOCK, enable_fp_fusion=False,
    )  # fmt: skip
    return not int(beyond)


@triton.jit
def _quantise(z, by, add, codes, beyond, chunk, columns, count, above, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    held = at < count
    side = at // chunk * columns + at % columns
    scaled = tl.load(z + at, held, 0.0) * tl.load(by + side, held, 0.0)
    code = scaled + tl.load(add + side, held, 0.0)
    far = held & ((code < 1.0) | (code >= above))
    tl.atomic_max(beyond, tl.max(far.to(tl.int32), 0))
    tl.store(codes + at, tl.where(far, 0.0, code).to(tl.int32).to(tl.int8), held)
