"""KV blocks over send and recv: a bounded, self-describing header, then the bytes.

Wire: 24 bytes (magic, version, flags, header bytes, payload bytes), the header in msgpack,
then either one packed message or one message per non-empty block, in order. Nothing that
arrives is ever unpickled.
"""

from __future__ import annotations

import math
import struct
import threading
import time
from collections.abc import Sequence

import msgspec
import torch
from torch import Tensor

from sagellm.core.protocols.comm_types import KVBlock
from sagellm.core.protocols.errors import ConfigError, IntegrityError, ResourceError

from .buffers import plain
from .shim import dtype_name
from .transport import RawCall, RawWork, Transport, WorkReport

__all__ = ["KV_TAG", "MAX_KV_BYTES", "KVReceive", "encode", "send_calls"]

KV_TAG = 0x4B56
"""Tag of all KV messages; user tags that equal it are refused."""
MAX_KV_BYTES = 64 << 30
_MAX_HEADER_BYTES = 16 << 20
_MAX_BLOCKS = 1 << 18
_MAX_DIMS = 16
_PACK_BELOW_BYTES = 1 << 20
_PREFIX = struct.Struct("<4sBBxxQQ")
_MAGIC = b"sgKV"
_VERSION = 1
_PACKED = 1


class _Entry(msgspec.Struct, array_like=True):
    shape: list[int]
    dtype: str
    layer: int
    index: int


class _Header(msgspec.Struct, array_like=True):
    blocks: list[_Entry]


def encode(blocks: Sequence[KVBlock]) -> tuple[bytes, bytes, bool, int]:
    """Prefix, header, whether the payload is packed, and payload bytes.

    Raises:
        ResourceError: More blocks or bytes than one message may have.

    """
    if len(blocks) > _MAX_BLOCKS:
        raise ResourceError(f"{len(blocks)} blocks in one call, at most {_MAX_BLOCKS}")
    payload = sum(b.tensor.nbytes for b in blocks)
    if payload > MAX_KV_BYTES:
        raise ResourceError(f"{payload} bytes of KV in one call, at most {MAX_KV_BYTES}")
    entries = [
        _Entry(list(b.tensor.shape), dtype_name(b.tensor.dtype), b.layer, b.index) for b in blocks
    ]
    header = msgspec.msgpack.encode(_Header(entries))
    packed = payload <= _PACK_BELOW_BYTES
    flags = _PACKED if packed else 0
    return _PREFIX.pack(_MAGIC, _VERSION, flags, len(header), payload), header, packed, payload


def send_calls(
    blocks: Sequence[KVBlock], dst: int, timeout_s: float, device: torch.device, text: str
) -> list[RawCall]:
    """The sends that carry `blocks`, in order. Packing copies; larger blocks go as they lie."""
    prefix, header, packed, payload = encode(blocks)
    messages = [_to_device(prefix, device), _to_device(header, device)]
    parts = [_as_bytes(b.tensor) for b in blocks if b.tensor.nbytes]
    if packed and payload:
        parts = [torch.cat(parts)]
    messages += parts
    return [
        RawCall(
            "send", [m], peer=dst, tag=KV_TAG, timeout_s=timeout_s, describe=text, device=device
        )
        for m in messages
    ]


def _to_device(data: bytes, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)


def _as_bytes(x: Tensor) -> Tensor:
    return plain(x).as_strided((x.numel(),), (1,)).view(torch.uint8)


class KVReceive(RawWork):
    """The receiving side: prefix, header, payload, each posted when the one before is there.

    Receives from one peer are taken in the order they were asked for: each waits for `earlier`.
    """

    def __init__(
        self, transport: Transport, src: int, timeout_s: float, text: str, earlier: KVReceive | None
    ) -> None:
        self.blocks: list[KVBlock] = []
        self.nbytes = 0
        self._transport = transport
        self._src = src
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._text = text
        self._earlier = earlier
        self._lock = threading.Lock()
        self._stage = 0
        self._pending: list[RawWork] = []
        self._buffer: Tensor | None = None
        self._flags = 0
        self._parts: list[tuple[_Entry, Tensor]] = []

    def wait(self, timeout_s: float) -> bool:
        end = time.monotonic() + timeout_s
        if not self._lock.acquire(timeout=max(0.0, timeout_s)):
            return False
        try:
            while self._stage < 4:
                if not self._step(max(0.0, end - time.monotonic())):
                    return False
            return True
        finally:
            self._lock.release()

    synchronize = wait

    def done(self) -> bool:
        return self._stage >= 4 or (not self._lock.locked() and self.wait(0))

    def _step(self, timeout_s: float) -> bool:
        """Wait for the present stage's receives, then post the next ones."""
        if self._stage == 0:
            if self._earlier is not None and not self._earlier.wait(timeout_s):
                return False
            self._earlier = None
            self._post([self._bytes(_PREFIX.size)])
            self._stage = 1
            return True
        start = time.monotonic()
        for raw in self._pending:
            if not raw.synchronize(max(0.0, timeout_s - (time.monotonic() - start))):
                return False
        self._pending = []
        if self._stage == 1:
            self._read_prefix()
        elif self._stage == 2:
            self._read_header()
        self._stage += 1
        return True

    def _bytes(self, count: int) -> Tensor:
        self._buffer = torch.empty(count, dtype=torch.uint8, device=self._transport.device)
        return self._buffer

    def _post(self, targets: Sequence[Tensor]) -> None:
        left = max(0.001, self._deadline - time.monotonic())
        for target in targets:
            call = RawCall(
                "recv",
                outputs=[target],
                peer=self._src,
                tag=KV_TAG,
                timeout_s=left,
                describe=self._text,
                device=self._transport.device,
                background=True,
            )
            self._pending.append(self._transport.issue(call))

    def _received(self) -> bytes:
        assert self._buffer is not None
        return bytes(self._buffer.cpu().tolist())  # torch without numpy has no shorter way

    def _read_prefix(self) -> None:
        magic, version, self._flags, header_bytes, self.nbytes = _PREFIX.unpack(self._received())
        if magic != _MAGIC or version != _VERSION:
            raise IntegrityError(
                f"{self._text}: not KV blocks of version {_VERSION}: {magic!r} version {version}"
            )
        if not 0 < header_bytes <= _MAX_HEADER_BYTES or self.nbytes > MAX_KV_BYTES:
            raise IntegrityError(
                f"{self._text}: header of {header_bytes} and payload of {self.nbytes} bytes are "
                f"beyond {_MAX_HEADER_BYTES} and {MAX_KV_BYTES}"
            )
        self._post([self._bytes(header_bytes)])

    def _read_header(self) -> None:
        try:
            header = msgspec.msgpack.decode(self._received(), type=_Header)
            sizes = [_entry_bytes(entry) for entry in header.blocks]
        except (msgspec.MsgspecError, ConfigError) as e:
            raise IntegrityError(f"{self._text}: header cannot be read: {e}") from e
        if sum(sizes) != self.nbytes or len(sizes) > _MAX_BLOCKS:
            raise IntegrityError(
                f"{self._text}: {len(sizes)} blocks of {sum(sizes)} bytes, announced {self.nbytes}"
            )
        device = self._transport.device
        if self._flags & _PACKED:
            flat = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
            parts = list(torch.split(flat, sizes)) if sizes else []
            targets = [flat] if self.nbytes else []
        else:
            parts = [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]
            targets = [part for part in parts if part.numel()]
        for entry, part in zip(header.blocks, parts, strict=True):
            self._parts.append((entry, part))
        self._post(targets)
        self.report = WorkReport(nbytes=self.nbytes)

    def result(self) -> list[KVBlock]:
        """The blocks, in the sender's order. Call once, after the work is done."""
        for entry, part in self._parts:
            dtype = getattr(torch, entry.dtype)
            # A slice of the packed buffer may start at any byte: a copy aligns it.
            data = part.clone() if part.storage_offset() % dtype.itemsize else part
            tensor = data.view(dtype).view(entry.shape)
            self.blocks.append(KVBlock(tensor, layer=entry.layer, index=entry.index))
        return self.blocks


def _entry_bytes(entry: _Entry) -> int:
    dtype = getattr(torch, entry.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"{entry.dtype!r} is no dtype of torch {torch.__version__}")
    if len(entry.shape) > _MAX_DIMS or any(n < 0 or n > MAX_KV_BYTES for n in entry.shape):
        raise ConfigError(f"shape {entry.shape} is not possible")
    return math.prod(entry.shape) * dtype.itemsize
