"""`none`: values as they are."""

from __future__ import annotations

from sagellm.core.protocols import CodecSpec, IntegrityError, Probe

from .codec import ByteCodec

__all__ = ["NONE", "NoneCodec"]


class NoneCodec(ByteCodec):
    """Sends blocks as they are."""

    def encode(self, block: memoryview, *, dtype: str) -> memoryview:
        """The block itself."""
        return block

    def decode(self, frame: memoryview, out: memoryview, *, dtype: str) -> None:
        """Copy the frame into `out`."""
        if len(frame) != len(out):
            raise IntegrityError(f"a frame of {len(frame)} bytes for a block of {len(out)}")
        out[:] = frame


NONE = CodecSpec(
    "none", True, lambda: Probe(True, "needs nothing"), lambda: NoneCodec, compresses=False
)
