"""What a codec is to a frame: it turns one section's values into bytes and back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from sagellm.comm.kv_transfer.memory import bytes_of
from sagellm.core.protocols import KVCodec

from .frame import Coding, Payload
from .layout import Geometry, Section

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["ByteCodec", "Scratch", "SectionCodec", "dtype_name", "narrowed"]

_WIDE = 1e38  # bfloat16 and float32 reach as far as what is computed with


class SectionCodec(ABC):
    """Codes sections. One object serves one thread: it reuses its buffers.

    Values are [tokens, heads, head_dim]; the constructor takes the codec's options by keyword
    and raises `ConfigError` for those that cannot work.

    Attributes:
        undoes_rope: Whether it gains by a layout that says how keys were rotated.
        has_kernels: Whether it also codes tensors on a GPU, where they are.
        version: Of what it writes; a channel uses it with peers of the same version only.
        join: Layers that it codes together, whose heads then lie side by side.
        fallbacks: What codes the sections that it cannot, before lossless ones do.

    """

    undoes_rope: ClassVar[bool] = False
    has_kernels: ClassVar[bool] = False
    version: ClassVar[int] = 1
    join: int = 1
    fallbacks: tuple[Coding, ...] = ()

    @property
    def held_bytes(self) -> int:
        """Bytes of the buffers that it keeps from call to call."""
        return 0

    def check(self, geometry: Geometry) -> None:
        """Raise `ConfigError` or `LayoutMismatchError` for tensors that it is not meant for."""
        del geometry  # a codec that was not calibrated takes any

    @abstractmethod
    def pack(self, x_THD: Tensor, section: Section) -> Payload | None:
        """The coded values; valid until the next call.

        Args:
            x_THD: On the CPU (or a GPU, see `has_kernels`), any strides; left as it is.
            section: What the values are.

        Returns:
            None when this codec cannot code these values (NaN, infinities, another dtype): a
            frame then falls back to the next codec.

        """

    @abstractmethod
    def unpack(self, payload: memoryview, out_THD: Tensor, section: Section) -> None:
        """Decode into `out_THD`, which may have any strides.

        Raises:
            IntegrityError: The payload cannot be one of this section.

        """


class ByteCodec(KVCodec, SectionCodec):
    """A codec of plain bytes is a codec of sections, whatever they mean."""

    def pack(self, x_THD: Tensor, section: Section) -> Payload:
        """The section's bytes, encoded."""
        return self.encode(bytes_of(x_THD.contiguous()), dtype=dtype_name(x_THD.dtype))

    def unpack(self, payload: memoryview, out_THD: Tensor, section: Section) -> None:
        """Decode, in place where `out_THD` is contiguous."""
        import torch

        into = out_THD
        if not out_THD.is_contiguous():
            into = torch.empty(out_THD.shape, dtype=out_THD.dtype)
        self.decode(payload, bytes_of(into), dtype=dtype_name(out_THD.dtype))
        if into is not out_THD:
            out_THD.copy_(into)


def narrowed(x: Tensor, dtype: torch.dtype, reach: float = _WIDE) -> Tensor:
    """Float32 values, held in place to what another type can say.

    Caches of narrow types end at their maximum: an error there must not become an infinity.

    Args:
        x: float32.
        dtype: Of what they are then copied to.
        reach: What no value's size exceeds: nothing is done where that fits.

    """
    import torch

    if not dtype.is_floating_point:
        return x
    most = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    return x if reach <= most else x.clamp_(-most, most)


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


@dataclass
class Scratch:
    """Buffers of one thread, kept from call to call and grown when a call needs more."""

    _held: dict[str, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(held.nbytes for held in self._held.values())

    def get(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu"
    ) -> Tensor:
        """The buffer of that name as a tensor of that shape, contents undefined."""
        import torch

        count = math.prod(shape)
        name = f"{name} on {device}"
        held = self._held.get(name)
        if held is None or held.dtype != dtype or held.numel() < count:
            held = self._held[name] = torch.empty(count, dtype=dtype, device=device)
        return held[:count].view(shape)
