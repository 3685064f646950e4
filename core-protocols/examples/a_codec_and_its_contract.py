"""Write a codec, and hold it to the contract that every codec has to keep.

python examples/a_codec_and_its_contract.py
"""

from __future__ import annotations

import zlib

from sagellm.core.protocols import IntegrityError, KVCodec
from sagellm.core.protocols.testing import check_codec


class ZlibCodec(KVCodec):
    """Zlib at its fastest level; frames are checked by zlib's own checksum."""

    def encode(self, block: memoryview, *, dtype: str) -> bytes:
        """The compressed block."""
        return zlib.compress(block, 1)

    def decode(self, frame: memoryview, out: memoryview, *, dtype: str) -> None:
        """Decompress into `out`, reading at most one byte more than fits."""
        stream = zlib.decompressobj()
        try:
            block = stream.decompress(frame, len(out) + 1)
        except zlib.error as e:
            raise IntegrityError(f"{len(frame)} bytes are no zlib frame: {e}") from None
        if len(block) != len(out) or not stream.eof or stream.unused_data:
            raise IntegrityError(f"a frame of {len(block)} bytes for a block of {len(out)}")
        out[:] = block


class TrustingCodec(ZlibCodec):
    """The same without looking: it lets zlib's own errors out."""

    def decode(self, frame: memoryview, out: memoryview, *, dtype: str) -> None:
        """Decompress into `out`."""
        out[:] = zlib.decompress(frame)


def main() -> int:
    """Check both; only the first keeps the contract."""
    reports = [check_codec(codec) for codec in (ZlibCodec, TrustingCodec)]
    for report in reports:
        print(report.text(), end="\n\n")
    return 0 if [r.ok() for r in reports] == [True, False] else 1


if __name__ == "__main__":
    raise SystemExit(main())
