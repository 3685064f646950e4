"""Collectives that send fewer bits than they are given: bf16, fp16, or int8 in scaled blocks.

`LossyCollectives` stands over any backend. Its all_reduce exchanges encoded parts, adds what it
reads in float32 and rank order, encodes the sums anew and gathers them, so that every rank reads
the same bytes and ends with the same bits, whatever the backend's own order is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sagellm.core.protocols import Choice, CommBackendProtocol, ConfigError, ReduceOp

from ._wire_choice import WireRates, choose_wire, find_rates
from ._wire_codec import WIRES, Codec, error_bound, make_codec

__all__ = ["LossyCollectives", "error_bound"]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(slots=True, eq=False)
class _Buffers:
    """Memory of one call shape: padded numbers, and what is sent and received."""

    padded: Tensor
    total: Tensor
    sent: Tensor
    received: Tensor


class LossyCollectives:
    """all_reduce, reduce_scatter and all_gather that may round what they send.

    Only sums and averages of float32, float16 and bfloat16 are rounded, and a cast is used only
    where it is smaller than the tensor's own dtype. Every other call goes to the backend as it
    is. `error_bound` says how far off a result can be; infinities and NaN: a cast keeps them,
    and in int8 the whole block of 256 that holds one reads as NaN, on every rank.

    Calls block, and one thread at a time makes them, the same ones on every rank.

    Args:
        backend: What moves the bytes. It must move uint8 with `all_to_all_single` and
            `all_gather_into_tensor`.
        wire: `none`, `bf16`, `fp16`, `int8`, or `auto`: whatever is expected to be fastest for
            a call's bytes. `auto` chooses among exact and cast or quantised calls.
        allow_lossy: Has to be True for anything but `none` and `auto`; with `auto` and False
            nothing is rounded.
        link_bytes_per_s: What one rank can send, for `auto`; None measures (collective, at the
            first call that needs it; rank 0's figures are taken by all).
        rates: Speeds of encoding and decoding for `auto`; None measures, as above.

    Raises:
        ConfigError: An unknown wire format, or a lossy one that is not allowed.

    """

    def __init__(
        self,
        backend: CommBackendProtocol,
        wire: str = "auto",
        *,
        allow_lossy: bool = False,
        link_bytes_per_s: float | None = None,
        rates: WireRates | None = None,
    ) -> None:
        check_wire(wire, allow_lossy, link_bytes_per_s)
        self.backend = backend
        self.wire = wire
        self.allow_lossy = allow_lossy
        self._link_bytes_per_s = link_bytes_per_s
        self._rates = rates
        self._codecs: dict[str, Codec] = {}
        self._buffers: dict[tuple[str, int, int], _Buffers] = {}

    def all_reduce(self, x: Tensor, op: str | ReduceOp = "sum") -> Tensor:
        """Replace `x` by its sum or average over ranks; the result is `x` itself."""
        reduction = ReduceOp.of(op)
        codec = self._codec_for("all_reduce", x, reduction)
        if codec is None:
            return _done(self.backend.all_reduce(x, reduction))
        size, rank = self.backend.size, self.backend.rank
        part = _round_up(-(-x.numel() // size), codec.granule)
        buffers = self._memory(codec, part, size)
        numbers = self._padded(x, buffers.padded)
        self._add_up(codec, numbers, buffers, part, reduction)
        mine = buffers.sent[rank]
        codec.encode(mine, buffers.total)
        _done(self.backend.all_gather_into_tensor(buffers.received, mine))
        direct = numbers is not buffers.padded
        for row, theirs in enumerate(buffers.received):
            codec.decode(numbers[row * part : (row + 1) * part], theirs)
        if not direct:
            x.copy_(numbers[: x.numel()].view(x.shape))
        return x

    def reduce_scatter_tensor(self, out: Tensor, x: Tensor, op: str | ReduceOp = "sum") -> Tensor:
        """Leave this rank's part of the sum or average in `out`; it is not rounded again."""
        reduction = ReduceOp.of(op)
        codec = self._codec_for("reduce_scatter_tensor", x, reduction)
        if codec is None or x.numel() != self.backend.size * out.numel() or x.dtype != out.dtype:
            return _done(self.backend.reduce_scatter_tensor(out, x, reduction))
        size = self.backend.size
        part = _round_up(out.numel(), codec.granule)
        buffers = self._memory(codec, part, size)
        rows = buffers.padded.view(size, part)
        rows[:, : out.numel()] = x.reshape(size, -1)
        rows[:, out.numel() :] = 0
        self._add_up(codec, buffers.padded, buffers, part, reduction)
        out.copy_(buffers.total[: out.numel()].view(out.shape))
        return out

    def all_gather_into_tensor(self, out: Tensor, x: Tensor) -> Tensor:
        """Fill `out` with every rank's `x`, each rounded once, this rank's own among them."""
        codec = self._codec_for("all_gather_into_tensor", x, ReduceOp.SUM)
        size = self.backend.size
        if codec is None or out.numel() != size * x.numel() or x.dtype != out.dtype:
            return _done(self.backend.all_gather_into_tensor(out, x))
        part = _round_up(x.numel(), codec.granule)
        buffers = self._memory(codec, part, size)
        mine = buffers.sent[self.backend.rank]
        codec.encode(mine, self._padded(x, buffers.total))
        _done(self.backend.all_gather_into_tensor(buffers.received, mine))
        numbers = buffers.padded.view(size, part)
        for row, theirs in zip(numbers, buffers.received, strict=True):
            codec.decode(row, theirs)
        out.copy_(numbers[:, : x.numel()].reshape(out.shape))
        return out

    def explain(self, op: str, nbytes: int, dtype: torch.dtype = torch.float32) -> Choice:
        """What such a call would send and why; the first question of `auto` may measure."""
        if self.wire != "auto":
            taken = self.wire if self._shrinks(self.wire, dtype) else "none"
            return Choice(self.backend.name, taken, f"wire {self.wire!r} was asked for")
        if not self.allow_lossy:
            return Choice(self.backend.name, "none", "rounding is not allowed (allow_lossy)")
        if self.backend.size == 1:
            return Choice(self.backend.name, "none", "a group of one sends nothing")
        if self._rates is None:
            self._rates = find_rates(self.backend, self._link_bytes_per_s)
        wires = [w for w in WIRES if self._shrinks(w, dtype)]
        return choose_wire(
            op, nbytes, self.backend.size, self._rates, wires, self.backend.name, dtype.itemsize
        )

    def takes(self, method: str, x: Tensor, op: ReduceOp) -> str | None:
        """The format that such a call would send; None for exact bytes."""
        if op not in (ReduceOp.SUM, ReduceOp.AVG) or x.dtype not in _FLOATS:
            return None
        if self.backend.size == 1 or x.numel() == 0 or self.wire == "none":
            return None
        name = self.wire
        if name == "auto":
            name = self.explain(method, x.nbytes, x.dtype).algorithm
        return name if self._shrinks(name, x.dtype) else None

    # -- inside -----------------------------------------------------------------------------

    def _codec_for(self, method: str, x: Tensor, op: ReduceOp) -> Codec | None:
        name = self.takes(method, x, op)
        if name is None:
            return None
        codec = self._codecs.get(name)
        if codec is None:
            codec = self._codecs[name] = make_codec(name)
        return codec

    @staticmethod
    def _shrinks(wire: str, dtype: torch.dtype) -> bool:
        return wire == "int8" or (wire in WIRES and dtype is torch.float32)

    def _memory(self, codec: Codec, part: int, size: int) -> _Buffers:
        key = (codec.name, part, size)
        found = self._buffers.get(key)
        if found is None:
            if len(self._buffers) >= 8:
                self._buffers.clear()
            device, row = self.backend.device_type, codec.wire_bytes(part)
            found = _Buffers(
                torch.empty(part * size, device=device),
                torch.empty(part, device=device),
                self.backend.empty((size, row), torch.uint8),
                self.backend.empty((size, row), torch.uint8),
            )
            self._buffers[key] = found
        return found

    @staticmethod
    def _padded(x: Tensor, room: Tensor) -> Tensor:
        """`x` itself where it is whole and float32, else a copy in `room`, padded with zeros."""
        n = x.numel()
        if n == room.numel() and x.dtype is torch.float32 and x.is_contiguous():
            return x.detach().view(-1)
        room[:n].view(x.shape).copy_(x)
        room[n:] = 0
        return room

    def _add_up(
        self, codec: Codec, numbers: Tensor, buffers: _Buffers, part: int, op: ReduceOp
    ) -> None:
        """Exchange encoded parts and leave this rank's part of the sum in `buffers.total`."""
        size, rank = self.backend.size, self.backend.rank
        rows = numbers.view(size, part)
        for row in range(size):
            if row != rank:
                codec.encode(buffers.sent[row], rows[row])
        _done(self.backend.all_to_all_single(buffers.received, buffers.sent))
        total = buffers.total
        for row in range(size):
            if row == rank:  # our own part never was on a wire: it is exact
                total.copy_(rows[rank]) if row == 0 else total.add_(rows[rank])
            else:
                codec.decode(total, buffers.received[row], add=row > 0)
        if op is ReduceOp.AVG:
            total.div_(size)


def check_wire(wire: str, allow_lossy: bool, link_bytes_per_s: float | None) -> None:
    """Refuse what can never work.

    Raises:
        ConfigError: An unknown format, a lossy one that is not allowed, or no bandwidth.

    """
    if wire not in ("auto", "none", *WIRES):
        raise ConfigError(f"wire {wire!r} is not one of auto, none, {', '.join(WIRES)}")
    if wire in WIRES and not allow_lossy:
        raise ConfigError(f"wire {wire!r} rounds what it sends; allow_lossy=True allows it")
    if link_bytes_per_s is not None and not link_bytes_per_s > 0:
        raise ConfigError(f"link_bytes_per_s must be above 0, got {link_bytes_per_s}")


def _round_up(n: int, granule: int) -> int:
    return -(-n // granule) * granule


def _done(result: object) -> Tensor:
    assert isinstance(result, Tensor)
    return result
