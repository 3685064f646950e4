"""`fp8`, `int8`, `int4`: fixed bits per value, and a scale per token, channel or group.

A payload is scales (bfloat16; for int4 also minima), then codes; of int4 those of the first half
of the values are the low halves of bytes.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from sagellm.core.protocols import CodecSpec, ConfigError, IntegrityError, Probe

from ._devices import runs_kernels
from .codec import Scratch, SectionCodec, narrowed
from .entropy import Bytes
from .frame import Payload
from .layout import CHUNK_TOKENS, Geometry, Kind, Section

if TYPE_CHECKING:
    from torch import Tensor

    from ._triton_fixed import Code

__all__ = ["FP8", "INT4", "INT8", "Fp8Codec", "Int4Codec", "Int8Codec", "fp8_values"]

_TINY = 2.0**-126


class _FixedCodec(SectionCodec):
    """Values in units of a scale.

    Args:
        k: What shares a scale in K: `token` (a head of a token), `channel` (of 256 tokens), or
            `group` (of channels of a head of a token).
        v: The same for V.
        group: Channels of a group; must divide the head's.

    """

    code: ClassVar[Code]
    top: ClassVar[int]  # no code means more scales than that
    sides: ClassVar[int] = 1  # numbers per scale
    per_byte: ClassVar[int] = 1
    has_kernels = True

    def __init__(self, k: str = "channel", v: str = "token", group: int = 32) -> None:
        for kind, grain in (("k", k), ("v", v)):
            if grain not in ("token", "channel", "group"):
                raise ConfigError(f"{kind}={grain!r}; known: token, channel, group")
        if group < 1:
            raise ConfigError(f"groups of {group} channels")
        self._grain = {"k": k, "v": v}
        self._group = group
        self._scratch = Scratch()

    @property
    def held_bytes(self) -> int:
        """Bytes of the buffers that it keeps from call to call."""
        return self._scratch.nbytes

    def check(self, geometry: Geometry) -> None:
        """Raise `ConfigError` where groups do not divide the heads."""
        kinds: tuple[Kind, ...] = ("k", "v") if geometry.kvs == 2 else (geometry.layout.kind,)
        for kind in kinds:
            self._length(geometry.dim, kind)

    def pack(self, x_THD: Tensor, section: Section) -> Payload | None:
        """Scales and codes; None for values that are not finite floats."""
        import torch

        if not x_THD.is_floating_point() or not x_THD.numel():
            return None
        if runs_kernels(x_THD):
            return self._pack_there(x_THD, section)
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

        groups = self._groups(out_THD.shape, section.kind)
        at = 2 * self.sides * sum(groups)
        size = -(-out_THD.numel() // self.per_byte)
        if len(payload) != at + size:
            raise IntegrityError(
                f"a section of {len(payload)} bytes; {at // 2} scales and {out_THD.numel()} codes "
                f"take {at + size}"
            )
        sides = self._sides(payload, groups)
        codes = np.frombuffer(payload, np.uint8, size, at)
        self._check_codes(codes)
        if runs_kernels(out_THD):
            self._unpack_there(codes, sides, out_THD, section)
            return
        f = self._scratch.get("f", tuple(out_THD.shape), torch.float32)
        self._values(codes, f)
        reach = 0.0
        for (values, axis), bits in zip(self._cut(f, section), sides, strict=False):
            shape = [self.sides, *values.shape]
            shape[axis + 1] = 1
            side = (bits.astype("<u4") << 16).view("<f4")
            reach = max(reach, self.top * float(side[0].max()) + float(np.abs(side[-1]).max()))
            self._unscale(values, torch.from_numpy(side).view(shape))
        out_THD.copy_(narrowed(f, out_THD.dtype, reach))

    def _sides(self, payload: memoryview, groups: Sequence[int]) -> list[NDArray[np.uint16]]:
        """The bits of each cut's scales, [sides, groups]; only such as are written."""
        numbers = np.frombuffer(payload, "<u2", self.sides * sum(groups))
        cuts = np.split(numbers, np.cumsum(groups)[:-1] * self.sides)
        sides = [cut.reshape(self.sides, -1) for cut in cuts]
        if any((s[0] - 0x80 >= 0x7F00).any() or (s & 0x7F80 == 0x7F80).any() for s in sides):
            raise IntegrityError("a section with scales that are not finite or not positive")
        return sides

    def _check_codes(self, codes: Bytes) -> None:
        """Raise `IntegrityError` for codes that stand for no number."""

    def _pack_there(self, x_THD: Tensor, section: Section) -> bytes | None:
        """As `pack`, by kernels."""
        from . import _triton_fixed

        length = self._length(x_THD.shape[2], section.kind)
        found = _triton_fixed.encode(x_THD.flatten(1), self.code, length)
        codes = found[2].cpu().numpy().tobytes()
        sides = [side.cpu().numpy() for side in found[: self.sides]]
        if any(((bits & 0x7F80) == 0x7F80).any() for bits in sides):
            return None
        parts, at = [], 0
        for groups in self._groups(x_THD.shape, section.kind):
            parts += [side[at : at + groups].tobytes() for side in sides]
            at += groups
        return b"".join([*parts, codes])

    def _unpack_there(
        self, codes: Bytes, sides: list[NDArray[np.uint16]], out_THD: Tensor, section: Section
    ) -> None:
        """As `unpack`, by kernels."""
        import torch

        from . import _triton_fixed

        # copies: torch takes no memory that it must not write
        joined = torch.from_numpy(np.concatenate(sides, 1).view(np.int16)).to(out_THD.device)
        table = torch.from_numpy(fp8_values()).to(out_THD.device)
        out = out_THD.new_empty(out_THD.shape, dtype=_triton_fixed.written(out_THD.dtype))
        _triton_fixed.decode(
            torch.from_numpy(codes.copy()).to(out.device), joined[0], joined[-1], table,
            out.flatten(1), self.code, self._length(out.shape[2], section.kind),
        )  # fmt: skip
        out_THD.copy_(narrowed(out, out_THD.dtype))

    def _length(self, dim: int, kind: Kind) -> int | None:
        """Consecutive values that share a scale; None where those of a channel do."""
        grain = self._grain[kind]
        if grain == "group" and dim % self._group:
            raise ConfigError(f"groups of {self._group} in heads of {dim} channels")
        return {"channel": None, "token": dim, "group": self._group}[grain]

    def _groups(self, shape: Sequence[int], kind: Kind) -> list[int]:
        """How many scales each cut has, as `_cut` cuts."""
        tokens, heads, dim = shape
        length = self._length(dim, kind)
        if length is not None:
            return [tokens * heads * dim // length if dim else 0]
        chunks = [tokens // CHUNK_TOKENS, int(tokens % CHUNK_TOKENS > 0)]
        return [c * heads * dim for c in chunks if c] or [0]

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
            self._length(f_THD.shape[2], section.kind)
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

    code = "fp8"
    top = 448

    def _scale(self, values: Tensor, axis: int) -> Tensor:
        return _divide(values, axis, 448.0)

    def _codes(self, f_THD: Tensor) -> bytes:
        import torch

        return f_THD.to(torch.float8_e4m3fn).view(torch.uint8).numpy().tobytes()

    def _check_codes(self, codes: Bytes) -> None:
        if len(codes) and (codes & 0x7F).max() == 0x7F:
            raise IntegrityError("a section with codes of fp8 that stand for no number")

    def _values(self, codes: Bytes, f_THD: Tensor) -> None:
        # torch converts one by one; 256 values are a table
        np.take(fp8_values(), codes, out=f_THD.view(-1).numpy())


class Int8Codec(_FixedCodec):
    """Integers to 127 in units of the largest value's 127th part."""

    code = "int8"
    top = 128

    def _scale(self, values: Tensor, axis: int) -> Tensor:
        return _divide(values, axis, 127.0)

    def _codes(self, f_THD: Tensor) -> bytes:
        import torch

        return f_THD.round_().to(torch.int8).numpy().tobytes()

    def _values(self, codes: Bytes, f_THD: Tensor) -> None:
        np.copyto(f_THD.view(-1).numpy(), codes.view(np.int8))


class Int4Codec(_FixedCodec):
    """Sixteen levels between the smallest and the largest value."""

    code = "int4"
    top = 15
    sides = 2
    per_byte = 2

    def _scale(self, values: Tensor, axis: int) -> Tensor:
        import torch

        low = values.amin(axis, keepdim=True)
        low = (low - low.abs() / 256 + 0.0).bfloat16()  # not above the smallest value, no -0
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
def fp8_values() -> NDArray[np.float32]:
    """What the 256 codes of float8_e4m3fn mean."""
    import torch

    codes = torch.arange(256, dtype=torch.uint8)
    return cast("NDArray[np.float32]", codes.view(torch.float8_e4m3fn).float().numpy())


def _spec(name: str, codec: type[_FixedCodec]) -> CodecSpec:
    return CodecSpec(name, False, lambda: Probe(True, "needs nothing"), lambda: codec)


FP8, INT8, INT4 = _spec("fp8", Fp8Codec), _spec("int8", Int8Codec), _spec("int4", Int4Codec)
