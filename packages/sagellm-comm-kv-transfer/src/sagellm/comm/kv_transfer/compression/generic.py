"""`lz4` and `zstd`: general-purpose compressors over bytes."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import cast

from sagellm.core.protocols import CodecSpec, ConfigError, IntegrityError, Probe

from .codec import ByteCodec

__all__ = ["LZ4", "ZSTD", "Lz4Codec", "ZstdCodec", "importable"]

_ZSTD_WINDOW_BYTES = 1 << 23


class Lz4Codec(ByteCodec):
    """LZ4 block format: fast, and small gains on floating-point caches.

    Args:
        acceleration: Higher is faster and larger.

    """

    def __init__(self, acceleration: int = 1) -> None:
        import lz4.block  # type: ignore[import-untyped]  # lz4 ships no types

        if not 1 <= acceleration <= 65537:
            raise ConfigError(f"acceleration {acceleration} is not in 1..65537")
        self._lz4 = lz4.block
        self._acceleration = acceleration

    def encode(self, block: memoryview, *, dtype: str) -> bytes:
        """The block as one LZ4 block without a size header."""
        return cast(
            "bytes",
            self._lz4.compress(
                block, mode="fast", acceleration=self._acceleration, store_size=False
            ),
        )

    def decode(self, frame: memoryview, out: memoryview, *, dtype: str) -> None:
        """Decode; at most `len(out)` bytes are allocated."""
        try:
            raw = self._lz4.decompress(frame, uncompressed_size=len(out))
        except self._lz4.LZ4BlockError as e:
            raise IntegrityError(f"an lz4 frame of {len(frame)} bytes is damaged: {e}") from None
        if len(raw) != len(out):
            raise IntegrityError(f"an lz4 frame holds {len(raw)} bytes, the block {len(out)}")
        out[:] = raw


class ZstdCodec(ByteCodec):
    """Zstandard: smaller than LZ4, and slower.

    Args:
        level: 1 to 22, or negative for faster.

    """

    def __init__(self, level: int = 1) -> None:
        import zstandard

        if not -100 <= level <= zstandard.MAX_COMPRESSION_LEVEL:
            raise ConfigError(f"level {level} is not in -100..{zstandard.MAX_COMPRESSION_LEVEL}")
        self._zstd = zstandard
        self._compressor = zstandard.ZstdCompressor(level=level)
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)

    def encode(self, block: memoryview, *, dtype: str) -> bytes:
        """The block as one Zstandard frame."""
        return self._compressor.compress(block)

    def decode(self, frame: memoryview, out: memoryview, *, dtype: str) -> None:
        """Decode straight into `out`."""
        # the reader fills `out` and no more, whatever size the frame claims
        reader = self._decompressor.stream_reader(frame, read_across_frames=False)
        done = 0
        try:
            while done < len(out) and (n := reader.readinto(out[done:])):
                done += n
            more = len(reader.read(1))
        except self._zstd.ZstdError as e:
            raise IntegrityError(f"a zstd frame of {len(frame)} bytes is damaged: {e}") from None
        if done != len(out) or more:
            raise IntegrityError(f"a zstd frame does not hold the {len(out)} bytes of its block")


def importable(module: str, hint: str) -> Callable[[], Probe]:
    """A probe that looks for a module without importing it."""

    def probe() -> Probe:
        if find_spec(module) is not None:
            return Probe(True, f"{module} is installed")
        return Probe(False, f"{module} is not installed; `{hint}` brings it")

    return probe


LZ4 = CodecSpec(
    "lz4", True, importable("lz4", "pip install lz4"), lambda: Lz4Codec, "pip install lz4"
)
ZSTD = CodecSpec(
    "zstd",
    True,
    importable("zstandard", "pip install zstandard"),
    lambda: ZstdCodec,
    "pip install zstandard",
)
