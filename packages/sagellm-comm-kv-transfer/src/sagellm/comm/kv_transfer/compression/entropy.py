"""Huffman coding of bytes: zstd told not to look for matches, which noise does not have."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from sagellm.core.protocols import IntegrityError

from .frame import Payload

if TYPE_CHECKING:
    import zstandard

__all__ = ["Bytes", "deflate", "inflate"]

Bytes = NDArray[np.uint8]
_local = threading.local()  # a context shared by threads crashes


def _contexts() -> tuple[zstandard.ZstdCompressor, zstandard.ZstdDecompressor]:
    if not hasattr(_local, "contexts"):
        import zstandard

        # smaller than level 1 on codes, and twice as fast; a target_length or a negative level
        # would turn Huffman coding off
        parameters = zstandard.ZstdCompressionParameters(
            strategy=zstandard.STRATEGY_FAST, window_log=17, hash_log=6, chain_log=6,
            search_log=1, min_match=7, target_length=0, write_content_size=1,
        )  # fmt: skip
        _local.contexts = (
            zstandard.ZstdCompressor(compression_params=parameters),
            zstandard.ZstdDecompressor(max_window_size=1 << 20),
        )
    return cast("tuple[zstandard.ZstdCompressor, zstandard.ZstdDecompressor]", _local.contexts)


def deflate(values: NDArray[Any]) -> bytes:  # Any: bytes or signed bytes
    """One zstd frame that states its size."""
    return _contexts()[0].compress(values.data)


def inflate(payload: Payload, size: int, out: Bytes | None = None) -> Bytes:
    """The `size` bytes that a frame of `deflate` holds, in `out` where one is given.

    Raises:
        IntegrityError: It holds another number of bytes, or is damaged; nothing was allocated
            beyond `size` and the decoder's own buffers.

    """
    import zstandard

    try:
        # before decoding: the decoder's buffers are as large as what a frame declares
        declared = zstandard.frame_content_size(payload)
        if declared != size:
            raise IntegrityError(f"a zstd frame declares {declared} bytes, the section has {size}")
        out = np.empty(size, np.uint8) if out is None else out
        reader = _contexts()[1].stream_reader(payload, read_across_frames=False)
        done = reader.readinto(out.data)
        if done != size or reader.read(1):
            raise IntegrityError(f"a zstd frame holds {done} bytes and declares {declared}")
    except zstandard.ZstdError as e:
        raise IntegrityError(f"a zstd frame of {len(payload)} bytes is damaged: {e}") from None
    return out
