"""`fp8`, `int8`, `int4`: fixed bits per value, and a scale per token, channel or group.

A payload is scales (bfloat16; for int4 also minima), then codes; of int4 those of the first half
of the values are the low halves of bytes.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from sagellm.core.protocols import CodecSpec, ConfigError, IntegrityError, Probe

from .codec import Scratch, SectionCodec
from .entropy import Bytes
from .frame import Payload
from .layout import CHUNK_TOKENS, Section

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FP8", "INT4", "INT8", "Fp8Codec", "Int4Codec", "Int8Codec"]

_TINY = 2.0**-126


class _FixedCodec(SectionCodec):
    """Values in units of a scale.

    Args:
        k: What shares a scale in K: `token` (a head of a token), `channel` (of 256 tokens), or
            `group` (of channels of a head of a token).
        v: The same for V.
        group: Channels of a group; must divide the head's.

    """

    sides: ClassVar[int] = 1  # numbers per scale
    per_byte: ClassVar[int] = 1

    def __init__(self, k: str = "channel", v: str = "token", group: int = 32) -> None:
        for kind, grain in (("k", k), ("v", v)):
            if grain not in ("token", "channel", "group"):
                raise ConfigError(f"{kind}={grain!r}; known: token, channel, group")
        if group < 1:
            raise ConfigError(f"groups of {group} channels")
        self._grain = {"k": k, "v": v}
        self._group = group
        self._scratch = Scratch()

    def pack(self, x_THD: Tensor, section: Section) -> Payload | None:
        """Scales and codes; None for values that are not finite floats."""
        import torch

        if not x_THD.is_floating_point() or not x_THD.numel():
            return None
        f = self._scratch.get("f", tuple(x_THD.shape), torch.float32)
        f.copy_(x_THD)
        if not bool(torch.isfinite(f.sum())) and not bool(torch.isfinite(f).all()):
            return None
        sides = []
        for values, axis in self._cut(f, section):
            side = self._scale(values, axis)
            sides.append(side.view(torch.int16).numpy().tobytes())
            if not bool(torch.isfinite(side).all()):
                return None
        return b"".join([*sides, self._codes(f)])

    def unpack(self, payload: memoryview, out_THD: Tensor, section: Section) -> None:
        """Decode into `out_THD`."""
        import torch

        f = self._scratch.get("f", tuple(out_THD.shape), torch.float32)
        cuts = list(self._cut(f, section))
        counts = [self.sides * v.numel() // v.shape[axis] for v, axis in cuts]
        size = -(-f.numel() // self.per_byte)
        if len(payload) != 2 * sum(counts) + size:
            raise IntegrityError(
                f"a section of {len(payload)} bytes; {sum(counts)} scales and {f.numel()} codes "
                f"take {2 * sum(counts) + size}"
            )
        self._values(np.frombuffer(payload, np.uint8, size, 2 * sum(counts)), f)
        at = 0
        for (values, axis), count in zip(cuts, counts, strict=True):
            bits = np.frombuffer(payload, "<u2", count, at).astype("<u4") << 16
            shape = [self.sides, *values.shape]
            shape[axis + 1] = 1
            self._unscale(values, torch.from_numpy(bits.view("<f4")).view(shape))
            at += 2 * count
        out_THD.copy_(f)

    def _cut(self, f_THD: Tensor, section: Section) -> Iterator[tuple[Tensor, int]]:
        """Views of the values, and the axis along which they share a scale."""
        grain = self._grain[section.kind]
        if grain == "channel":
            whole = f_THD.shape[0] // CHUNK_TOKENS * CHUNK_TOKENS
            if whole:
                yield f_THD[:whole].view(-1, CHUNK_TOKENS, *f_THD.shape[1:]), 1
            if whole < f_THD.shape[0]:
                yield f_THD[whole:].unsqueeze(0), 1
        elif grain == "token":
            yield f_THD, 2
        else:
            if f_THD.shape[2] % self._group:
                raise ConfigError(f"groups of {self._group} in heads of {f_THD.shape[2]} channels")
            yield f_THD.view(*f_THD.shape[:2], -1, self._group), 3

    @abstractmethod
    def _scale(self, values: Tensor, axis: int) -> Tensor:
        """Bring values to the codes' range, in place; scales [sides, ...] in bfloat16."""

    def _unscale(self, values: Tensor, side: Tensor) -> None:
        values.mul_(side[0])

    @abstractmethod
    def _codes(self, f_THD: Tensor) -> bytes:
        """Scaled values as codes."""

    @abstractmethod
    def _values(self, codes: Bytes, f_THD: Tensor) -> None:
        """Codes as scaled values, into `f_THD`."""


class Fp8Codec(_FixedCodec):
    """float8_e4m3 in units of the largest value's 448th part."""

    def _scale(self, values: Tensor, axis: int) -> Tensor:
        return _divide(values, axis, 448.0)

    def _codes(self, f_THD: Tensor) -> bytes:
        import torch

        return f_THD.to(torch.float8_e4m3fn).view(torch.uint8).numpy().tobytes()

    def _values(self, codes: Bytes, f_THD: Tensor) -> None:
        # torch converts one by one; 256 values are a table
        np.take(_e4m3(), codes, out=f_THD.view(-1).numpy())


class Int8Codec(_FixedCodec):
    """Integers to 127 in units of the largest value's 127th part."""

    def _scale(self, values: Tensor, axis: int) -> Tensor:
        return _divide(values, axis, 127.0)

    def _codes(self, f_THD: Tensor) -> bytes:
        import torch

        return f_THD.round_().to(torch.int8).numpy().tobytes()

    def _values(self, codes: Bytes, f_THD: Tensor) -> None:
        np.copyto(f_THD.view(-1).numpy(), codes.view(np.int8))


class Int4Codec(_FixedCodec):
    """Sixteen levels between the smallest and the largest value."""

    sides = 2
    per_byte = 2

    def _scale(self, values: Tensor, axis: int) -> Tensor:
        import torch

        low = values.amin(axis, keepdim=True)
        low = (low - low.abs() / 256).bfloat16()  # not above the smallest value
        step = ((values.amax(axis, keepdim=True) - low.float()) / 15).bfloat16()
        step.clamp_(min=_TINY)
        values.sub_(low.float()).div_(step.float()).clamp_(0, 15)
        return torch.stack([step, low])

    def _unscale(self, values: Tensor, side: Tensor) -> None:
        values.mul_(side[0]).add_(side[1])

    def _codes(self, f_THD: Tensor) -> bytes:
        import torch

        codes = f_THD.round_().to(torch.uint8).view(-1).numpy()
        half = -(-len(codes) // 2)
        both = codes[:half].copy()
        both[: len(codes) - half] |= codes[half:] << 4
        return both.tobytes()

    def _values(self, codes: Bytes, f_THD: Tensor) -> None:
        flat = f_THD.view(-1).numpy()
        half = len(codes)
        np.copyto(flat[:half], codes & 15)
        np.copyto(flat[half:], codes[: len(flat) - half] >> 4)


def _divide(values: Tensor, axis: int, top: float) -> Tensor:
    import torch

    largest = torch.maximum(values.amax(axis, keepdim=True), -values.amin(axis, keepdim=True))
    scale = (largest / top).bfloat16().clamp_(min=_TINY)
    values.div_(scale.float()).clamp_(-top, top)
    return scale.unsqueeze(0)


@functools.cache
def _e4m3() -> NDArray[np.float32]:
    import torch

    codes = torch.arange(256, dtype=torch.uint8)
    return cast("NDArray[np.float32]", codes.view(torch.float8_e4m3fn).float().numpy())


def _spec(name: str, codec: type[_FixedCodec]) -> CodecSpec:
    return CodecSpec(name, False, lambda: Probe(True, "needs nothing"), lambda: codec)


FP8, INT8, INT4 = _spec("fp8", Fp8Codec), _spec("int8", Int8Codec), _spec("int4", Int4Codec)
