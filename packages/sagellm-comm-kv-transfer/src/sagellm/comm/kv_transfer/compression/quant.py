"""`quant`: uniform quantisation of centred channels, entropy-coded; one knob, `step`.

A section's payload: head, then means (bfloat16) and exponents (int8, log2 of the deviation in
eighths) per 256 tokens and channel, escapes, codes. Channels that RoPE rotates come first, as
all first halves of pairs and all second ones; `_tiles` says in which order values are coded.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sagellm.core.protocols import CodecSpec, ConfigError, IntegrityError

from .codec import Scratch, SectionCodec
from .entropy import deflate, inflate
from .frame import Payload
from .generic import importable
from .layout import CHUNK_TOKENS, Kind, Section
from .rope import RopeSpec, pairs_of, rotate

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["QUANT", "QuantCodec"]

_HEAD = struct.Struct("<BBHI")  # flags, 0, 0, escapes
_ROTATED, _PAIRED = 1, 2
_ESCAPE = np.dtype([("at", "<u4"), ("code", "<i2")])
_POWERS = np.exp2(np.arange(256, dtype=np.uint8).view(np.int8) / 8)
_LARGEST = float(2**15 - 1)
_WILD = 2.0**30  # of a variance; its eighths of octaves fit a byte
_CALM = np.float32(2.0**-30)
_TILE_VALUES = 1 << 18  # float32 copies of a tile stay in a core's second-level cache


@dataclass(frozen=True, slots=True)
class _Tile:
    """Values that are worked on together: some heads of some chunks of tokens."""

    chunks: int
    tokens: int  # of a chunk
    start: int
    heads: slice
    dims: slice
    rope: RopeSpec | None

    def view(self, x_THD: Tensor) -> Tensor:
        """The tile's values in place, [1 or 2, tokens, heads, dims]."""
        x = x_THD[self.start : self.start + self.chunks * self.tokens, self.heads]
        return pairs_of(x, self.rope) if self.rope else x[..., self.dims].unsqueeze(0)


def _tiles(tokens: int, heads: int, dim: int, rope: RopeSpec | None) -> Iterator[_Tile]:
    """A section's tiles in the order in which they are coded."""
    parts: list[tuple[slice, RopeSpec | None]] = [(slice(0, rope.dim), rope)] if rope else []
    first = rope.dim if rope else 0
    if first < dim:
        parts.append((slice(first, dim), None))
    for dims, turned in parts:
        width = dims.stop - dims.start
        some = max(1, min(heads, _TILE_VALUES // (CHUNK_TOKENS * width)))
        many = max(1, _TILE_VALUES // (CHUNK_TOKENS * width * some))
        whole = tokens // CHUNK_TOKENS
        spans = [
            (min(many, whole - c), CHUNK_TOKENS, c * CHUNK_TOKENS) for c in range(0, whole, many)
        ]
        if tokens % CHUNK_TOKENS:
            spans.append((1, tokens % CHUNK_TOKENS, whole * CHUNK_TOKENS))
        for chunks, length, start in spans:
            for h in range(0, heads, some):
                yield _Tile(chunks, length, start, slice(h, min(h + some, heads)), dims, turned)


class QuantCodec(SectionCodec):
    """Quantises with steps in units of the spread of the values, and codes the integers.

    Per 256 tokens every channel loses its mean; the step of K follows each channel's standard
    deviation (outlier channels change nothing), the step of V each head's. K is rotated back to
    what it was before RoPE where the layout says how. The error of a value, before K is rotated
    again and rounded to its dtype, is at most half a step.

    Args:
        step: From 1/32 (near-lossless) to 2.
        k: Step of K in units of `step` and of a channel's standard deviation.
        v: Step of V in units of `step` and of a head's standard deviation.

    """

    undoes_rope = True

    def __init__(self, step: float = 0.25, k: float = 0.7, v: float = 1.4) -> None:
        if not all(1 / 256 <= s * step <= 16 for s in (k, v)):
            raise ConfigError(f"steps {k * step:g} of K, {v * step:g} of V are not in 1/256..16")
        self._steps = {"k": k * step, "v": v * step}
        # by the byte of an exponent: computed once, for many small calls cost more than large ones
        self._scales = {kind: (_POWERS * s).astype(np.float32) for kind, s in self._steps.items()}
        self._inverse = {kind: 1 / table for kind, table in self._scales.items()}
        self._scratch = Scratch()

    def pack(self, x_THD: Tensor, section: Section) -> Payload | None:
        """Means, scales, escapes and codes; None for values that are not finite floats."""
        import torch

        if not x_THD.is_floating_point():
            return None
        paired = self._paired(section.kind, x_THD.numel())
        limit = 7 if paired else 127
        codes = self._scratch.get("codes", (x_THD.numel(),), torch.int8)
        sides: tuple[list[bytes], list[bytes]] = ([], [])
        escapes, at = [], 0
        tokens, heads, dim = x_THD.shape
        for tile in _tiles(tokens, heads, dim, section.rope):
            z = self._load(tile, x_THD, section)
            bound = self._normalise(z, section.kind, dim, sides)
            if bound is None:
                return None
            flat = z.view(-1)
            values = flat.numpy()
            if bound > limit:
                top = max(float(values.max()), -float(values.min()))
                if top > _LARGEST:
                    return None
                if top > limit + 0.5:
                    escapes.append(_escapes(values, limit, at))
                    flat.clamp_(-limit, limit)
            codes[at : at + len(values)].copy_(flat.round_())
            at += len(values)
        strays = np.concatenate(escapes) if escapes else np.empty(0, _ESCAPE)
        if len(strays) * 16 > x_THD.numel():
            return None
        if paired:
            low, high = codes.view(2, -1)
            codes = low.add_(8).bitwise_or_(high.add_(8).bitwise_left_shift_(4))
        flags = (_ROTATED if section.rope else 0) | (_PAIRED if paired else 0)
        head = _HEAD.pack(flags, 0, 0, len(strays))
        return b"".join([head, *sides[0], *sides[1], strays.tobytes(), deflate(codes.numpy())])

    def unpack(self, payload: memoryview, out_THD: Tensor, section: Section) -> None:
        """Decode into `out_THD`."""
        tokens, heads, dim = out_THD.shape
        count = out_THD.numel()
        spread = 1 if section.kind == "k" else dim  # channels per exponent
        sides = -(-tokens // CHUNK_TOKENS) * heads * dim
        at = _HEAD.size + 2 * sides + sides // spread
        if len(payload) < at:
            raise IntegrityError(f"a quant section of {len(payload)} bytes; means end at {at}")
        flags, zero, nought, strays = _HEAD.unpack_from(payload)
        paired = self._paired(section.kind, count)
        if flags != (_ROTATED if section.rope else 0) | (_PAIRED if paired else 0) or zero | nought:
            raise IntegrityError(f"a quant section with flags {flags} does not fit its frame")
        if strays > count or at + strays * _ESCAPE.itemsize > len(payload):
            raise IntegrityError(f"{strays} escapes in a quant section of {count} values")
        escapes = np.frombuffer(payload, _ESCAPE, strays, at)
        places = escapes["at"]
        if strays and (int(places[-1]) >= count or (places[1:] <= places[:-1]).any()):
            raise IntegrityError(f"escapes out of order or beyond the section's {count} values")
        codes = inflate(payload[at + escapes.nbytes :], count // 2 if paired else count)
        codes = np.concatenate([codes & 15, codes >> 4]) if paired else codes.view(np.int8)
        offset = 8 if paired else 0
        means = np.frombuffer(payload, "<u2", sides, _HEAD.size).astype("<u4") << 16
        if not np.isfinite(means.view("<f4")).all():
            raise IntegrityError("a quant section with means that are not finite")
        exponents = np.frombuffer(payload, np.uint8, sides // spread, _HEAD.size + 2 * sides)
        scales = np.repeat(self._scales[section.kind].take(exponents), spread)
        shifts = means.view("<f4") - offset * scales
        at = side = 0
        for tile in _tiles(tokens, heads, dim, section.rope):
            view = tile.view(out_THD)
            z = self._room("z", tile, view)
            values = z.view(-1).numpy()
            size = len(values)
            np.copyto(values, codes[at : at + size])
            if strays:
                first, last = np.searchsorted(places, [at, at + size])
                values[places[first:last] - at] = escapes["code"][first:last] + offset
            n = size // tile.tokens
            shape = (*z.shape[:2], 1, z.shape[3])
            scale, shift = (s[side : side + n].reshape(shape) for s in (scales, shifts))
            self._store(tile, z, scale, shift, view, section)
            at += size
            side += n

    def _paired(self, kind: Kind, count: int) -> bool:
        """Whether codes are so small that two share a byte, which Huffman's whole bits need."""
        return self._steps[kind] > 0.6 and count % 2 == 0

    def _room(self, name: str, tile: _Tile, view: Tensor) -> Tensor:
        """A buffer [1 or 2, chunks, tokens, channels]."""
        import torch

        shape = (view.shape[0], tile.chunks, tile.tokens, view.shape[2] * view.shape[3])
        return self._scratch.get(name, shape, torch.float32)

    def _load(self, tile: _Tile, x_THD: Tensor, section: Section) -> Tensor:
        """A tile in float32, before RoPE."""
        view = tile.view(x_THD)
        z = self._room("z", tile, view)
        if tile.rope is None:
            z.view(view.shape).copy_(view)
            return z
        turned, tables = (self._room(n, tile, view).view(view.shape) for n in ("a", "b"))
        turned.copy_(view)
        at = section.position + tile.start
        rotate(turned, z.view(view.shape), tables, tile.rope, at, undo=True)
        return z

    def _store(
        self, tile: _Tile, z: Tensor, scale: NDArray[np.float32], shift: NDArray[np.float32],
        view: Tensor, section: Section,
    ) -> None:  # fmt: skip
        """Scale a tile, rotate it and write it to its place."""
        import torch

        torch.addcmul(torch.from_numpy(shift), z, torch.from_numpy(scale), out=z)
        x = z.view(view.shape)
        if tile.rope:
            turned, tables = (self._room(n, tile, view).view(view.shape) for n in ("a", "b"))
            rotate(x, turned, tables, tile.rope, section.position + tile.start, undo=False)
            x = turned
        view.copy_(x)

    def _normalise(
        self, z: Tensor, kind: Kind, dim: int, sides: tuple[list[bytes], list[bytes]]
    ) -> float | None:
        """Take means off and divide by steps, in place.

        Returns:
            What no code exceeds, for none of n values lies beyond sqrt(n) deviations; None for
            values that are not finite or too wild.

        """
        import torch

        mean = z.mean(2, keepdim=True).bfloat16()
        z.sub_(mean.float())
        square = self._scratch.get("a", tuple(z.shape), torch.float32)
        energy = torch.mul(z, z, out=square).sum(2).numpy().reshape(-1)
        power = np.add.reduce(energy.reshape(-1, dim), 1) if kind == "v" else energy
        count = z.shape[2] * (dim if kind == "v" else 1)
        top = float(energy.max())
        if not top < _WILD * z.shape[2]:
            return None
        eighths = np.log2(power * np.float32(1 / count) + _CALM)
        eighths *= 4
        exponent = np.rint(eighths, out=eighths).astype(np.int8)
        inverse = self._inverse[kind].take(exponent.view(np.uint8))
        if kind == "v":
            inverse = np.repeat(inverse, dim)
        z.mul_(torch.from_numpy(inverse).view(mean.shape))
        energy *= inverse
        energy *= inverse
        sides[0].append(mean.view(torch.int16).numpy().tobytes())
        sides[1].append(exponent.tobytes())
        return math.sqrt(float(energy.max())) * 1.01


def _escapes(values: NDArray[np.float32], limit: int, first: int) -> NDArray[Any]:
    at = np.flatnonzero(np.abs(values) > limit + 0.5)
    found = np.empty(len(at), _ESCAPE)
    found["at"], found["code"] = at + first, np.rint(values[at])
    return found


QUANT = CodecSpec(
    "quant",
    False,
    importable("zstandard", "pip install zstandard"),
    lambda: QuantCodec,
    "pip install zstandard",
)
