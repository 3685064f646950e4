"""`lz4-planes` and `zstd-planes`: the first bytes of all values, then the second ones, …."""

from __future__ import annotations

import numpy as np

from sagellm.core.protocols import CodecSpec, KVCodec

from .codec import ByteCodec
from .entropy import Bytes
from .frame import ITEM_BYTES
from .generic import LZ4, ZSTD, Lz4Codec, ZstdCodec

__all__ = ["LZ4_PLANES", "ZSTD_PLANES", "Lz4Planes", "PlanesCodec", "ZstdPlanes"]


class PlanesCodec(ByteCodec):
    """Another codec over byte planes: the bytes with the exponents come together.

    Args:
        inner: Codes the planes.

    """

    def __init__(self, inner: KVCodec) -> None:
        self._inner = inner

    def encode(self, block: memoryview, *, dtype: str) -> bytes | memoryview:
        """The planes, encoded."""
        values = np.frombuffer(block, np.uint8)
        planes = np.ascontiguousarray(values.reshape(-1, _width(len(values), dtype)).T)
        return self._inner.encode(planes.reshape(-1).data, dtype=dtype)

    def decode(self, frame: memoryview, out: memoryview, *, dtype: str) -> None:
        """Decode by way of a buffer of the block's size."""
        planes: Bytes = np.empty(len(out), np.uint8)
        self._inner.decode(frame, planes.data, dtype=dtype)
        width = _width(len(out), dtype)
        np.frombuffer(out, np.uint8).reshape(-1, width)[:] = planes.reshape(width, -1).T


class Lz4Planes(PlanesCodec):
    """LZ4 over byte planes.

    Args:
        acceleration: Higher is faster and larger.

    """

    def __init__(self, acceleration: int = 1) -> None:
        super().__init__(Lz4Codec(acceleration))


class ZstdPlanes(PlanesCodec):
    """Zstandard over byte planes.

    Args:
        level: 1 to 22, or negative for faster.

    """

    def __init__(self, level: int = 1) -> None:
        super().__init__(ZstdCodec(level))


def _width(count: int, dtype: str) -> int:
    width = ITEM_BYTES.get(dtype, 1)
    return width if count % width == 0 else 1


LZ4_PLANES = CodecSpec("lz4-planes", True, LZ4.probe, lambda: Lz4Planes, LZ4.install_hint)
ZSTD_PLANES = CodecSpec("zstd-planes", True, ZSTD.probe, lambda: ZstdPlanes, ZSTD.install_hint)
