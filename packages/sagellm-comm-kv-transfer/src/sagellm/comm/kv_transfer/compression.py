"""Codecs for blocks on the wire: none, LZ4 and Zstandard, found by entry point.

A block that a codec does not make smaller is sent as it is. Decoding writes into the block;
sizes are checked before anything is allocated, because frames come from the network.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import cast

from sagellm.core.protocols import (
    BackendUnavailableError,
    CodecSpec,
    ConfigError,
    IntegrityError,
    KVCodec,
    Probe,
)
from sagellm.core.protocols.registry import Registry

__all__ = [
    "CODEC_GROUP",
    "LZ4",
    "NONE",
    "ZSTD",
    "Lz4Codec",
    "NoneCodec",
    "ZstdCodec",
    "codec_names",
    "create_codec",
    "load_codec_spec",
]

CODEC_GROUP = "sagellm.comm.kv_transfer.codecs"
_ZSTD_WINDOW_BYTES = 1 << 23


class NoneCodec(KVCodec):
    """Sends blocks as they are."""

    def encode(self, block: memoryview, *, dtype: str) -> memoryview:
        """The block itself."""
        return block

    def decode(self, frame: memoryview, out: memoryview, *, dtype: str) -> None:
        """Copy the frame into `out`."""
        if len(frame) != len(out):
            raise IntegrityError(f"a frame of {len(frame)} bytes for a block of {len(out)}")
        out[:] = frame


class Lz4Codec(KVCodec):
    """LZ4 block format: fast, and small gains on floating-point caches.

    Args:
        acceleration: Higher is faster and larger.

    """

    def __init__(self, acceleration: int = 1) -> None:
        import lz4.block  # type: ignore[import-untyped]  # lz4 ships no types

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


class ZstdCodec(KVCodec):
    """Zstandard: smaller than LZ4, and slower.

    Args:
        level: 1 to 22, or negative for faster.

    """

    def __init__(self, level: int = 1) -> None:
        import zstandard

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


def _importable(module: str, hint: str) -> Callable[[], Probe]:
    def probe() -> Probe:
        if find_spec(module) is not None:
            return Probe(True, f"{module} is installed")
        return Probe(False, f"{module} is not installed; `{hint}` brings it")

    return probe


NONE = CodecSpec(
    "none", True, lambda: Probe(True, "needs nothing"), lambda: NoneCodec, compresses=False
)
LZ4 = CodecSpec(
    "lz4", True, _importable("lz4", "pip install lz4"), lambda: Lz4Codec, "pip install lz4"
)
ZSTD = CodecSpec(
    "zstd",
    True,
    _importable("zstandard", "pip install zstandard"),
    lambda: ZstdCodec,
    "pip install zstandard",
)

_registry: Registry[CodecSpec] = Registry(CODEC_GROUP)


def codec_names() -> tuple[str, ...]:
    """Names of the installed codecs, sorted."""
    return _registry.names()


def load_codec_spec(name: str) -> CodecSpec:
    """The codec of that name, checked to be usable here.

    Raises:
        ConfigError: No such codec; the message lists the installed ones.
        BackendUnavailableError: What it needs is missing.

    """
    spec = _registry.load(name)
    probe = spec.probe()
    if not probe.available:
        raise BackendUnavailableError(f"codec {name!r}: {probe.reason}")
    return spec


def create_codec(name: str) -> KVCodec:
    """A codec object, for one thread.

    Raises:
        ConfigError: No such codec.
        BackendUnavailableError: What it needs is missing.

    """
    codec = load_codec_spec(name).load()()
    if not isinstance(codec, KVCodec):
        raise ConfigError(f"codec {name!r} gave {type(codec).__name__}, which is no KVCodec")
    return codec
