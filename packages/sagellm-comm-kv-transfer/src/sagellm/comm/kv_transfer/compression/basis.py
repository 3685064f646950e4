"""A basis for `transform`: what calibration found, as one safetensors file.

The header of the file is a function of `BasisInfo` alone, so that a reader compares instead of
parsing: tensors, types, shapes and offsets have no freedom that somebody hostile could use.
Shapes: C channels of one part (`join` layers x heads x head_dim).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from sagellm.core.protocols import ConfigError, IntegrityError, LayoutMismatchError, ResourceError

from .layout import Geometry, Kind
from .rope import RopeSpec

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MAX_CHANNELS", "Basis", "BasisInfo", "Part", "build"]

VERSION = 1
MAX_CHANNELS = 8192
MAX_BYTES = 2 << 30
LIMIT = 2.0  # steps that no value moves further than: checked on encode, else `quant` codes it
_MAX_HEADER = 4 << 20
_FORMAT = "sagellm-kv-basis"
_KINDS: tuple[Kind, ...] = get_args(Kind)
_TYPES: dict[str, np.dtype[Any]] = {  # Any: of the values
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
}
_ROUNDED = 0.02  # how far from orthonormal half precision may take a matrix, per element of G


class BasisInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a basis was fitted on, and for which tensors it is.

    Attributes:
        model: Fingerprint of the model: of its configuration and of samples of its weights.
        layers: Layers of the model.
        heads: KV heads of a layer.
        dim: Channels of a head.
        join: Layers that are transformed together: 1 is per layer, `layers` is across all.
        dtype: Of the cache that was calibrated on.
        text: Hash of the calibration windows.
        tokens: Number of calibration tokens.
        inv_freq: Of the RoPE that was undone; empty where the model has none.
        interleaved: Its convention.
        version: Of this format.

    """

    model: str
    layers: int
    heads: int
    dim: int
    join: int
    dtype: str
    text: str
    tokens: int
    inv_freq: tuple[float, ...] = ()
    interleaved: bool = False
    version: int = VERSION

    @property
    def rope(self) -> RopeSpec | None:
        """The RoPE that is undone."""
        return RopeSpec(self.inv_freq, self.interleaved) if self.inv_freq else None

    @property
    def channels(self) -> int:
        """Channels of a part."""
        return self.join * self.heads * self.dim

    def __str__(self) -> str:
        return describe(self.model, self.layers, self.heads, self.dim, self.rope)

    def check(self) -> None:
        """Raise `ConfigError` for what no basis can be."""
        counts = (self.layers, self.heads, self.dim, self.join)
        if self.version != VERSION:
            raise ConfigError(f"basis version {self.version}; this release reads {VERSION}")
        if min(counts) < 1 or max(counts) > 1 << 16 or self.layers % self.join:
            raise ConfigError(
                f"a basis joins {self.join} of {self.layers} layers, {self.heads} heads of "
                f"{self.dim}: `join` must divide the layers, and all be positive"
            )
        if self.channels > MAX_CHANNELS:
            raise ConfigError(
                f"{self.join} layers of {self.heads} heads of {self.dim} are {self.channels} "
                f"channels; a basis has at most {MAX_CHANNELS}: join fewer layers"
            )
        if self.rope and self.rope.dim > self.dim:
            raise ConfigError(f"RoPE over {self.rope.dim} channels of heads of {self.dim}")
        if max(len(self.model), len(self.dtype), len(self.text)) > 256:
            raise ConfigError("a basis's fingerprints have at most 256 characters")


@dataclass(frozen=True, slots=True)
class Part:
    """The transform of K or V of `join` layers; y = ((x - mean) * weight) @ matrix.

    Attributes:
        mean: Per channel, [C] float32.
        weight: What makes one step right for all channels, [C] float32.
        deviation: Of each component, falling, [C] float32.
        matrix: Orthonormal, a component per column, [C, C] float32.

    """

    mean: Tensor
    weight: Tensor
    deviation: NDArray[np.float32]
    matrix: Tensor


class Basis:
    """An immutable, checked basis. Thread-safe.

    Attributes:
        info: What it is for.
        data: The file's bytes.
        fingerprint: xxh3_128 of them, in hexadecimal.

    """

    def __init__(self, data: bytes, *, max_bytes: int = MAX_BYTES) -> None:
        """Check and take a basis.

        Raises:
            IntegrityError: Not a basis, damaged, not finite or not orthonormal.
            ResourceError: Larger than `max_bytes`.

        """
        if len(data) > max_bytes:
            raise ResourceError(f"a basis of {len(data)} bytes; at most {max_bytes} are taken")
        self.info, start = _read_info(data)
        self.data = data
        self.fingerprint: str = xxhash.xxh3_128_hexdigest(data)
        self._parts = dict(_read_parts(data, self.info, start))

    @classmethod
    def load(cls, path: str | Path, *, max_bytes: int = MAX_BYTES) -> Basis:
        """A basis from a file; raises also `OSError`."""
        with Path(path).open("rb") as f:
            return cls(f.read(max_bytes + 1), max_bytes=max_bytes)

    def save(self, path: str | Path) -> None:
        """Write the file."""
        Path(path).write_bytes(self.data)

    def part(self, kind: Kind, layer: int) -> Part:
        """The transform of K or V that the model's layer belongs to."""
        return self._parts[kind, layer // self.info.join]

    def bound(self, step: float) -> float:
        """What no value moves further than, in standard deviations of its channel.

        Before K is rotated again and values are rounded to their dtype. Of the channel that is
        worst off, as calibration saw it: quiet channels move by most of their own deviations.
        """
        import torch

        quietest = min(
            float(((p.matrix * torch.from_numpy(p.deviation)).square().sum(1)).min())
            for p in self._parts.values()
        )
        return LIMIT * step / math.sqrt(quietest) if quietest > 0 else math.inf

    def check(self, geometry: Geometry) -> None:
        """Whether it is for such tensors.

        Raises:
            LayoutMismatchError: Another model, geometry or RoPE; names both.

        """
        layout, info = geometry.layout, self.info
        heads, first = geometry.heads // geometry.join, layout.first_layer
        layers = geometry.layers * geometry.join
        model = layout.model or info.model
        fits = (model, heads, geometry.dim) == (info.model, info.heads, info.dim)
        fits = fits and first + layers <= info.layers and first % info.join == 0
        if fits and geometry.join == info.join and layout.rope == info.rope:
            return
        theirs = f"layers {first} to {first + layers - 1} of {layout.model or 'a model'}: "
        raise LayoutMismatchError(
            f"basis {self.fingerprint[:12]} is not for this tensor; calibrate one for this model",
            ours=f"{info}, {info.join} together",
            theirs=theirs + describe("", layers, heads, geometry.dim, layout.rope),
        )


def describe(model: str, layers: int, heads: int, dim: int, rope: RopeSpec | None) -> str:
    """A geometry in words."""
    turned = "no RoPE"
    if rope:
        way = "interleaved" if rope.interleaved else "half-split"
        digest = xxhash.xxh3_64_hexdigest(repr(rope).encode())[:8]
        turned = f"{way} RoPE over {rope.dim} channels ({digest})"
    return f"{model} {layers} layers, {heads} heads of {dim}, {turned}".strip()


def build(info: BasisInfo, parts: dict[tuple[Kind, int], Part]) -> Basis:
    """A basis of the parts' values; matrices are stored in half precision."""
    info.check()
    text = msgspec.json.encode(info).decode()
    header = _header(text, info)
    pieces = [struct.pack("<Q", len(header)), header]
    for kind, index, field, dtype, _ in _tensors(info):
        values = np.asarray(getattr(parts[kind, index], field))
        pieces.append(np.ascontiguousarray(values, _TYPES[dtype]).tobytes())
    return Basis(b"".join(pieces))


def _tensors(info: BasisInfo) -> Iterator[tuple[Kind, int, str, str, tuple[int, ...]]]:
    """Kind, part, field, type and shape of every tensor, in the order of the file."""
    n = info.channels
    for kind in _KINDS:
        for index in range(info.layers // info.join):
            for field in ("mean", "weight", "deviation"):
                yield kind, index, field, "F32", (n,)
            yield kind, index, "matrix", "F16", (n, n)


def _header(text: str, info: BasisInfo) -> bytes:
    fields: dict[str, object] = {"__metadata__": {"format": _FORMAT, "basis": text}}
    at = 0
    for kind, index, field, dtype, shape in _tensors(info):
        end = at + math.prod(shape) * _TYPES[dtype].itemsize
        name = f"{kind}.{index}.{field}"
        fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": (at, end)}
        at = end
    body = json.dumps(fields, separators=(",", ":")).encode()
    return body + b" " * (-len(body) % 8)


class _Metadata(msgspec.Struct):
    basis: str
    format: str


class _Header(msgspec.Struct):
    metadata: _Metadata = msgspec.field(name="__metadata__")


def _read_info(data: bytes) -> tuple[BasisInfo, int]:
    """What the file says it is, its header and size checked; and where tensors begin."""
    length = struct.unpack_from("<Q", data)[0] if len(data) >= 8 else 0
    if not 0 < length <= min(_MAX_HEADER, len(data) - 8):
        raise IntegrityError(f"{len(data)} bytes with a header of {length} are no basis")
    header = data[8 : 8 + length]
    try:
        metadata = msgspec.json.decode(header, type=_Header).metadata
        info = msgspec.json.decode(metadata.basis, type=BasisInfo)
        info.check()
        expected = _header(metadata.basis, info)
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError) as e:
        raise IntegrityError(f"not a basis of `calibrate`: {e}") from None
    size = sum(math.prod(shape) * _TYPES[t].itemsize for *_, t, shape in _tensors(info))
    if header != expected or len(data) != 8 + length + size:
        raise IntegrityError(
            f"the header of a basis of {len(data)} bytes is not that of {info}, which has {size} "
            f"bytes of values"
        )
    return info, 8 + length


def _read_parts(data: bytes, info: BasisInfo, at: int) -> Iterator[tuple[tuple[Kind, int], Part]]:
    import torch

    found: dict[str, NDArray[np.float32]] = {}
    for kind, index, field, dtype, shape in _tensors(info):
        raw = np.frombuffer(data, _TYPES[dtype], math.prod(shape), at)
        at += raw.nbytes
        if not np.isfinite(raw).all():
            raise IntegrityError(f"{kind}.{index}.{field} of a basis is not finite")
        found[field] = raw.astype(np.float32).reshape(shape)
        if field != "matrix":
            continue
        name, deviation, weight = f"{kind}.{index}", found["deviation"], found["weight"]
        if (deviation < 0).any() or (deviation[1:] > deviation[:-1]).any():
            raise IntegrityError(f"deviations {name} of a basis do not fall")
        if not ((weight > 1e-15) & (weight < 1e15)).all() or deviation.max() > 1e15:
            raise IntegrityError(f"weights {name} of a basis are not in 1e-15..1e15")
        if np.abs(found["mean"]).max() > 1e15:
            raise IntegrityError(f"means {name} of a basis are wild")
        matrix = _orthonormal(torch.from_numpy(found["matrix"]), name)
        mean = torch.from_numpy(found["mean"])
        yield (kind, index), Part(mean, torch.from_numpy(weight), deviation, matrix)


def _orthonormal(matrix: Tensor, name: str) -> Tensor:
    """The matrix without what half precision has cost it; checked."""
    import torch

    eye = torch.eye(len(matrix))
    for allowed in (_ROUNDED, 1e-4):
        gram = matrix.T @ matrix
        off = float((gram - eye).abs().max())
        if not off < allowed:
            raise IntegrityError(f"matrix {name} of a basis is not orthonormal: off by {off:.2g}")
        if allowed == _ROUNDED:
            matrix = matrix @ torch.addmm(eye, eye, gram, beta=1.5, alpha=-0.5)  # Newton-Schulz
    return matrix
