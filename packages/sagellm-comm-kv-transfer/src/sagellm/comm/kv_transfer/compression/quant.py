"""`quant`: uniform quantisation of centred channels, entropy-coded; one knob, `step`.

A section's payload: head, then means (bfloat16) and exponents (int8, log2 of the deviation in
eighths) per 256 tokens and channel, escapes, codes. Channels that RoPE rotates come first, head by
head, all first halves of pairs and all second ones; `_tiles` says in which order values are coded.

Codes are positive: a code is the integer below value / step + 1/2 + 128 (8 when two share a byte),
for conversions to integers round to zero and passes over the values are what time goes into.
Encoding rounds products and sums apart: fused, codes would depend on the machine.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sagellm.core.protocols import CodecSpec, ConfigError, IntegrityError

from ._devices import runs_kernels
from .codec import Scratch, SectionCodec, narrowed
from .entropy import deflate, inflate
from .frame import Payload
from .generic import importable
from .layout import CHUNK_TOKENS, MAX_SECTION_BYTES, Kind, Section
from .rope import RopeSpec, pairs_of, rotate

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BOUND", "QUANT", "QuantCodec"]

BOUND = 0.5375
"""Steps by which a value moves at most with `per_channel`, before K is rotated again and all is
rounded to its dtype, in units of its channel's standard deviation over 256 tokens: half a step,
4.5 % for a deviation's exponent, 1.6 % for `_CALM` and 1 % for the arithmetic."""

_HEAD = struct.Struct("<BBHI")  # flags, 0, 0, escapes
_ROTATED, _PAIRED = 1, 2
_ESCAPE = np.dtype([("at", "<u4"), ("code", "<i2")])
_POWERS = np.exp2(np.arange(256, dtype=np.uint8).view(np.int8) / 8)
_LARGEST = float(2**15 - 1)
_WILD = 2.0**30  # of a variance; its eighths of octaves fit a byte
_CALM = np.float32(2.0**-30)
_FAINT = np.float32(2.0**-25)  # of a variance; `_CALM` makes steps of smaller ones too coarse
_TILE_VALUES = 1 << 18  # smaller ones stay in a core's second-level cache and cost more calls
_SECTION_VALUES = MAX_SECTION_BYTES // 2  # a GPU takes them at once
_FAR = np.float32(2.0**12)  # a mean's square in variances, beyond which float32 sums cancel


class _Tile:
    """Values that are worked on together, some heads of some chunks of tokens, and room for them.

    Args:
        chunks: Number of chunks.
        tokens: Tokens of a chunk.
        start: First token.
        heads: Which heads.
        dims: Which channels of them.
        rope: How these are rotated; None when they are not.
        rooms: Two buffers that all tiles of a section share.

    """

    def __init__(
        self, chunks: int, tokens: int, start: int, heads: slice, dims: slice,
        rope: RopeSpec | None, rooms: Sequence[Tensor],
    ) -> None:  # fmt: skip
        import torch

        self.tokens, self.start, self.rope = tokens, start, rope
        self._at = (slice(start, start + chunks * tokens), heads, dims)
        count, width = heads.stop - heads.start, dims.stop - dims.start
        self.size = chunks * tokens * count * width
        self.flat, spare = (room[: self.size] for room in rooms)
        self.words = spare.view(torch.int16)[: self.size]
        # heads lie one behind the other where channels are rotated: they share cosines
        columns = width // 2 if rope else count * width
        self.z, self.spare = (x.view(-1, tokens, columns) for x in (self.flat, spare))
        self.sides = self.z.shape[0] * columns
        if rope:
            shape = (2, count, chunks * tokens, columns)
            self._shaped = tuple(x.view(shape).transpose(1, 2) for x in (self.flat, spare))
        else:
            self._shaped = (self.flat.view(1, chunks * tokens, count, width),)

    def _view(self, x_THD: Tensor) -> Tensor:
        """The tile's values in place, [1 or 2, tokens, heads, dims]."""
        x = x_THD[self._at]
        return pairs_of(x, self.rope) if self.rope else x.unsqueeze(0)

    def load(self, x_THD: Tensor, position: int, scratch: Scratch) -> None:
        """Take the values in float32, rotated back, into `z`; `position` is the section's."""
        x = x_THD[self._at]
        if self.rope is None:
            self._shaped[0].copy_(x.unsqueeze(0))
            return
        z, turned = self._shaped
        # read in one run before heads are taken apart: memory is slow at scattered rows
        held = scratch.get(f"held {x.dtype}", tuple(x.shape), x.dtype, str(x.device))
        turned.copy_(pairs_of(held.copy_(x), self.rope))
        rotate(turned, z, None, self.rope, position + self.start, undo=True)

    def store(self, out_THD: Tensor, position: int, scratch: Scratch) -> None:
        """Rotate `z` again and write it to its place."""
        view = self._view(out_THD)
        if self.rope is None:
            narrowed(self.flat, view.dtype)
            view.copy_(self._shaped[0])
            return
        z, turned = self._shaped
        rotate(z, turned, None, self.rope, position + self.start, undo=False)
        narrowed(self.spare, view.dtype)
        if view.dtype == turned.dtype or view.device.type != "cpu":
            view.copy_(turned)
            return
        # rounded in one run, then moved: torch is slow at both at once, and at scattered rows
        rounded = scratch.get(f"held {view.dtype}", (self.size,), view.dtype)
        rounded.view(self.spare.shape).copy_(self.spare)
        pairs, tokens, heads, width = view.shape
        moved = rounded.view(pairs, heads, tokens, width).transpose(1, 2)
        np.copyto(_integers(view), _integers(moved))


def _integers(x: Tensor) -> NDArray[Any]:  # Any: integers as wide as the values
    import torch

    same = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.view(same[x.itemsize]).numpy()


def _tiles(
    tokens: int, heads: int, dim: int, rope: RopeSpec | None, scratch: Scratch, device: str
) -> list[_Tile]:
    """A section's tiles in the order in which they are coded."""
    import torch

    parts: list[tuple[slice, RopeSpec | None]] = [(slice(0, rope.dim), rope)] if rope else []
    first = rope.dim if rope else 0
    if first < dim:
        parts.append((slice(first, dim), None))
    values = _TILE_VALUES if device == "cpu" else _SECTION_VALUES
    cuts = []
    for dims, turned in parts:
        width = dims.stop - dims.start
        some = max(1, min(heads, values // (CHUNK_TOKENS * width)))
        many = max(1, values // (CHUNK_TOKENS * width * some))
        whole = tokens // CHUNK_TOKENS
        spans = [
            (min(many, whole - c), CHUNK_TOKENS, c * CHUNK_TOKENS) for c in range(0, whole, many)
        ]
        if tokens % CHUNK_TOKENS:
            spans.append((1, tokens % CHUNK_TOKENS, whole * CHUNK_TOKENS))
        for chunks, length, start in spans:
            for h in range(0, heads, some):
                part = slice(h, min(h + some, heads))
                cuts.append((chunks, length, start, part, dims, turned))
    # no more than there is: of wide rows a section has few
    most = max(
        (chunks * length * (part.stop - part.start) * (dims.stop - dims.start)
         for chunks, length, _, part, dims, _ in cuts), default=0,
    )  # fmt: skip
    rooms = [scratch.get(name, (most,), torch.float32, device) for name in ("z", "spare")]
    return [_Tile(*cut, rooms) for cut in cuts]


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
        per_channel: Have V's steps follow channels, too, and keep the bound that `BOUND` states:
            sections where that cannot be are lossless.

    """

    undoes_rope = True
    has_kernels = True

    def __init__(
        self, step: float = 0.25, k: float = 0.7, v: float = 1.4, per_channel: bool = False
    ) -> None:
        if not all(1 / 256 <= s * step <= 16 for s in (k, v)):
            raise ConfigError(f"steps {k * step:g} of K, {v * step:g} of V are not in 1/256..16")
        self._steps = {"k": k * step, "v": v * step}
        self._bounded = per_channel
        # by the byte of an exponent: computed once, for many small calls cost more than large ones
        self._scales = {kind: (_POWERS * s).astype(np.float32) for kind, s in self._steps.items()}
        self._inverse = {kind: 1 / table for kind, table in self._scales.items()}
        self._scratch = Scratch()
        self._plans: dict[tuple[object, ...], list[_Tile]] = {}

    @property
    def held_bytes(self) -> int:
        """Bytes of the buffers that it keeps from call to call."""
        return self._scratch.nbytes

    def _plan(self, x_THD: Tensor, rope: RopeSpec | None) -> list[_Tile]:
        """The tiles of sections of a shape; sections of a few shapes follow one another."""
        tokens, heads, dim = x_THD.shape
        device = str(x_THD.device)
        key = (tokens, heads, dim, rope, device)
        if key not in self._plans:
            before = self._scratch.nbytes
            tiles = _tiles(tokens, heads, dim, rope, self._scratch, device)
            if len(self._plans) >= 4 or self._scratch.nbytes != before:
                self._plans.clear()  # those of smaller rooms would keep these
            self._plans[key] = tiles
        return self._plans[key]

    def pack(self, x_THD: Tensor, section: Section) -> Payload | None:
        """Means, scales, escapes and codes; None for values that are not finite floats.

        None also for float64, which float32 would not tell apart.
        """
        import torch

        if not x_THD.is_floating_point() or x_THD.dtype == torch.float64:
            return None
        paired = self._paired(section.kind, x_THD.numel())
        offset = 8 if paired else 128
        device = str(x_THD.device)
        codes = self._scratch.get("codes", (x_THD.numel(),), torch.int8, device)
        sides: tuple[list[bytes], list[bytes]] = ([], [])
        escapes, at = [], 0
        for tile in self._plan(x_THD, section.rope):
            tile.load(x_THD, section.position, self._scratch)
            found = self._normalise(tile, section.kind, x_THD.shape[2], offset, sides)
            if found is None:
                return None
            bound, by, add = found
            place = codes[at : at + tile.size]
            at += tile.size
            if runs_kernels(x_THD):
                from . import _triton_quant

                if _triton_quant.quantise(tile.z, by, add, place, 2 * offset):
                    continue
            tile.z.mul_(by).add_(add)
            if bound >= offset - 1:
                values = tile.flat.cpu().numpy()
                low, high = float(values.min()), float(values.max())
                if max(offset - low, high - offset) > _LARGEST:
                    return None
                if low < 1 or high >= 2 * offset:
                    escapes.append(_escapes(values, offset, at - tile.size))
                    tile.flat.clamp_(1, 2 * offset - 1)
            # by way of words: twice as fast
            place.copy_(tile.words.copy_(tile.flat))
        strays = np.concatenate(escapes) if escapes else np.empty(0, _ESCAPE)
        if len(strays) * 16 > x_THD.numel():
            return None
        if paired:
            low_half, high_half = codes.view(2, -1)
            codes = low_half.bitwise_or_(high_half.bitwise_left_shift_(4))
        flags = (_ROTATED if section.rope else 0) | (_PAIRED if paired else 0)
        head = _HEAD.pack(flags, 0, 0, len(strays))
        return b"".join(
            [head, *sides[0], *sides[1], strays.tobytes(), deflate(codes.cpu().numpy())]
        )

    def unpack(self, payload: memoryview, out_THD: Tensor, section: Section) -> None:
        """Decode into `out_THD`."""
        import torch

        tokens, heads, dim = out_THD.shape
        count = out_THD.numel()
        spread = self._spread(section.kind, dim)
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
        codes = self._codes(payload[at + escapes.nbytes :], count, paired).to(out_THD.device)
        offset = 8 if paired else 0
        means = np.frombuffer(payload, "<u2", sides, _HEAD.size).astype("<u4") << 16
        if not np.isfinite(means.view("<f4")).all():
            raise IntegrityError("a quant section with means that are not finite")
        exponents = np.frombuffer(payload, np.uint8, sides // spread, _HEAD.size + 2 * sides)
        scales = np.repeat(self._scales[section.kind].take(exponents), spread)
        shifts = means.view("<f4") - offset * scales
        scale, shift = (torch.from_numpy(s).to(out_THD.device) for s in (scales, shifts))
        at = side = 0
        for tile in self._plan(out_THD, section.rope):
            tile.flat.copy_(codes[at : at + tile.size])
            if strays:
                first, last = np.searchsorted(places, [at, at + tile.size])
                inside = torch.from_numpy(places[first:last].astype(np.int64) - at)
                wide = torch.from_numpy(escapes["code"][first:last].astype(np.float32) + offset)
                tile.flat[inside.to(codes.device)] = wide.to(codes.device)
            shape = (tile.z.shape[0], 1, tile.z.shape[2])
            by, add = (s[side : side + tile.sides].view(shape) for s in (scale, shift))
            torch.addcmul(add, tile.z, by, out=tile.z)
            tile.store(out_THD, section.position, self._scratch)
            at += tile.size
            side += tile.sides

    def _codes(self, payload: memoryview, count: int, paired: bool) -> Tensor:
        """A section's codes, one to a byte."""
        import torch

        codes = self._scratch.get("codes", (count,), torch.uint8)
        if not paired:
            inflate(payload, count, codes.numpy())
            # signed: a mean that is far below a step must not drown in 128 steps
            return codes.bitwise_xor_(128).view(torch.int8)
        both = self._scratch.get("pairs", (count // 2,), torch.uint8)
        inflate(payload, count // 2, both.numpy())
        torch.bitwise_and(both, 15, out=codes[: count // 2])
        torch.bitwise_right_shift(both, 4, out=codes[count // 2 :])
        return codes

    def _spread(self, kind: Kind, dim: int) -> int:
        """Channels per exponent."""
        return 1 if kind == "k" or self._bounded else dim

    def _paired(self, kind: Kind, count: int) -> bool:
        """Whether codes are so small that two share a byte, which Huffman's whole bits need."""
        return self._steps[kind] > 0.6 and count % 2 == 0

    def _normalise(
        self, tile: _Tile, kind: Kind, dim: int, offset: int,
        sides: tuple[list[bytes], list[bytes]],
    ) -> tuple[float, Tensor, Tensor] | None:  # fmt: skip
        """What makes of a tile's values those that lie less than one above their codes.

        Returns:
            What no code's distance from `offset` exceeds, for none of n values lies beyond
            sqrt(n) deviations; factors and summands. None for values that are not finite or
            too wild, or whose deviation float32 or an exponent cannot tell.

        """
        import torch

        z, tokens = tile.z, tile.tokens
        total = z.sum(1).cpu().numpy()
        square = torch.mul(z, z, out=tile.spare).sum(1).cpu().numpy()
        bits = (total * np.float32(1 / tokens)).view(np.uint32)
        bits += 0x8000
        bits &= 0xFFFF0000  # bfloat16
        mean = bits.view(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            energy = square - mean * (total + total - tokens * mean)
        if not (energy * _FAR >= square).all():  # also when they are not numbers
            z.sub_(torch.from_numpy(mean).unsqueeze(1).to(z.device))
            mean = np.zeros_like(mean)
            total = z.sum(1).cpu().numpy()
            energy = torch.mul(z, z, out=tile.spare).sum(1).cpu().numpy()
        if not float(energy.max()) < _WILD * tokens:
            return None
        stray = total - tokens * mean  # how far means were rounded is no deviation
        power, about = energy - stray * stray * np.float32(1 / tokens), energy
        count, spread = tokens, self._spread(kind, dim)
        if spread > 1:
            power, about = (np.add.reduce(p.reshape(-1, dim), 1) for p in (power, energy))
            count = tokens * dim
        told = (power > _FAINT * count) & (power * 64 > about)
        if not (told | (about == 0)).all():
            return None
        eighths = power * np.float32(1 / count)
        eighths += _CALM
        np.log2(eighths, out=eighths)
        eighths *= 4
        exponent = np.rint(eighths, out=eighths).astype(np.int8)
        inverse = self._inverse[kind].take(exponent.view(np.uint8))
        if spread > 1:
            inverse = np.repeat(inverse, dim).reshape(mean.shape)
        shift = np.float32(offset + 0.5) - mean * inverse
        by, add = (torch.from_numpy(s).unsqueeze(1).to(z.device) for s in (inverse, shift))
        sides[0].append((bits >> 16).astype(np.uint16).tobytes())
        sides[1].append(exponent.tobytes())
        energy *= inverse
        energy *= inverse
        return math.sqrt(float(energy.max())) * 1.01, by, add


def _escapes(values: NDArray[np.float32], offset: int, first: int) -> NDArray[Any]:
    at = np.flatnonzero((values < 1) | (values >= 2 * offset))
    found = np.empty(len(at), _ESCAPE)
    found["at"], found["code"] = at + first, np.floor(values[at]) - offset
    return found


QUANT = CodecSpec(
    "quant",
    False,
    importable("zstandard", "pip install zstandard"),
    lambda: QuantCodec,
    "pip install zstandard",
)
