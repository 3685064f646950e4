"""Topologies as bounded bytes: msgpack inside zlib, as text where a store takes only text."""

from __future__ import annotations

import base64
import binascii
import zlib

import msgspec

from sagellm.core.protocols import IntegrityError, ResourceError, TopologyInfo

from ._fragment_check import check_info

__all__ = ["MAX_ENCODED_BYTES", "MAX_PLAIN_BYTES", "decode_info", "encode_info"]

MAX_ENCODED_BYTES = 16 << 20
"""Longest text that is written or read."""

MAX_PLAIN_BYTES = 256 << 20
"""Most bytes that a body may unpack to; 10 000 devices take about a tenth of it."""


def encode_info(info: TopologyInfo) -> str:
    """The topology as ASCII text.

    Raises:
        ResourceError: It is too large to be exchanged.

    """
    text = base64.b85encode(zlib.compress(msgspec.msgpack.encode(info), 1)).decode("ascii")
    if len(text) > MAX_ENCODED_BYTES:
        raise ResourceError(f"topology takes {len(text)} bytes, more than {MAX_ENCODED_BYTES}")
    return text


def decode_info(text: bytes) -> TopologyInfo:
    """The topology in what `encode_info` gave; unknown fields are ignored.

    Raises:
        IntegrityError: It is no such text, larger than allowed, or says what cannot be.

    """
    if len(text) > MAX_ENCODED_BYTES:
        raise IntegrityError(f"topology of {len(text)} bytes, more than {MAX_ENCODED_BYTES}")
    try:
        unpack = zlib.decompressobj()
        body = unpack.decompress(base64.b85decode(text), MAX_PLAIN_BYTES)
        if unpack.unconsumed_tail or not unpack.eof:
            raise IntegrityError(f"topology unpacks to more than {MAX_PLAIN_BYTES} bytes or is cut")
        info = msgspec.msgpack.decode(body, type=TopologyInfo)
    except (ValueError, zlib.error, binascii.Error, msgspec.MsgspecError) as e:
        raise IntegrityError(f"not a topology: {e}") from e
    check_info(info)
    return info
