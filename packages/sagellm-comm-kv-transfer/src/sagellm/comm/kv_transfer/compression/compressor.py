"""From tensors to frames and back: sections coded in parallel, in place, within bounds."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar, cast

import xxhash

from sagellm.core.protocols import (
    BackendUnavailableError,
    ConfigError,
    IntegrityError,
    LayoutMismatchError,
    ResourceError,
)

from ._devices import DEVICES, runs_kernels
from ._registry import create_section_codec, section_codec_spec
from .codec import Scratch, SectionCodec, dtype_name
from .frame import ENTRY_BYTES, ITEM_BYTES, Coding, Entry, Header, Option, Payload, split
from .layout import Geometry, Section, TensorLayout
from .rope_check import check_rope

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Compressor", "Decoder", "Encoder"]

T = TypeVar("T")
_FALLBACKS = ("lossless", "none")
_DAMAGE = (ConfigError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)
"""What codecs, those of others too, may trip over in payloads that somebody made up."""

_KEPT_BYTES = 16 << 20  # of buffers of the codecs that a thread is not using
_local = threading.local()


class _Bench:
    """What one thread works with: a codec object of each coding, and buffers."""

    def __init__(self) -> None:
        self._codecs: dict[tuple[object, ...], SectionCodec] = {}
        self._last: tuple[object, ...] | None = None
        self.scratch = Scratch()

    def codec(self, coding: Coding) -> SectionCodec:
        """The thread's codec for that coding."""
        key = coding.key
        if key == self._last:
            return self._codecs[key]
        self._last = None
        found = self._codecs.pop(key, None)
        # senders of ever new options do not fill memory
        kept = sum(codec.held_bytes for codec in self._codecs.values())
        if len(self._codecs) >= 16 or kept > _KEPT_BYTES:
            self._codecs.clear()
        if found is None:
            found = create_section_codec(coding.name, coding.options)
        self._codecs[key] = found
        self._last = key
        return found


def _bench() -> _Bench:
    if not hasattr(_local, "bench"):
        _local.bench = _Bench()
    return cast("_Bench", _local.bench)


class Encoder:
    """One tensor on its way into a frame: the header at once, sections as they are asked for.

    Attributes:
        header: Goes first.
        view: The tensor as [layer, kv, block, token, head, dim].

    """

    def __init__(
        self, tensor: Tensor, layout: TensorLayout, codings: tuple[Coding, ...], join: int = 1
    ) -> None:
        dtype = dtype_name(tensor.dtype)
        if tensor.device.type not in DEVICES:
            raise ConfigError(f"a tensor on {tensor.device}; copy it to the CPU first")
        if dtype not in ITEM_BYTES:
            raise ConfigError(f"dtype {dtype} is not coded; known: {', '.join(ITEM_BYTES)}")
        geometry = Geometry(tuple(tensor.shape), layout, ITEM_BYTES[dtype], join=join)
        self.header = Header(geometry, dtype, codings)
        self.view = geometry.canonical(tensor.detach())

    def section(self, index: int) -> tuple[bytes, Payload]:
        """The table's entry of a section and its payload; from any thread.

        The payload is valid until the next call in this thread.
        """
        geometry, bench = self.header.geometry, _bench()
        section = geometry.section(index)
        x = _gathered(geometry, self.view, section, bench.scratch)
        raw = geometry.section_bytes(index)
        for number, coding in enumerate(self.header.codings):
            codec = bench.codec(coding)
            if not (codec.has_kernels and runs_kernels(x)):
                x = x.cpu()
            payload = codec.pack(x, section)
            if payload is None:
                continue
            if memoryview(payload).nbytes < raw or number + 1 == len(self.header.codings):
                return self.header.seal(index, number, payload), payload
        raise ConfigError(f"no codec of {self.header.codings} can code section {index}")

    def __iter__(self) -> Iterator[tuple[bytes, Payload]]:
        """All sections in order, in this thread."""
        return (self.section(i) for i in range(self.header.geometry.sections))


class Decoder:
    """Sections of a frame on their way into a tensor, in any order and from any threads.

    Args:
        header: The frame's.
        out: Where to, any strides, on the CPU or a CUDA GPU; of the shape and dtype that the
            header says.

    """

    def __init__(self, header: Header, out: Tensor) -> None:
        want = f"{header.dtype}{list(header.geometry.shape)}"
        have = f"{dtype_name(out.dtype)}{list(out.shape)}"
        if have != want or out.device.type not in DEVICES:
            raise LayoutMismatchError(
                f"the frame does not fit `out` on {out.device}", ours=have, theirs=want
            )
        for coding in header.codings:
            try:
                section_codec_spec(coding.name)
            except (ConfigError, BackendUnavailableError) as e:
                raise IntegrityError(f"the frame cannot be decoded here: {e}") from None
        self.header = header
        self._view = header.geometry.canonical(out.detach())

    def section(self, index: int, entry: Entry, payload: memoryview) -> None:
        """Decode a section into its place; on an error the contents of that place are undefined.

        Raises:
            IntegrityError: The payload is damaged, or is not what the entry says.

        """
        if len(payload) != entry.nbytes:
            raise IntegrityError(f"section {index}: {len(payload)} bytes of {entry.nbytes}")
        if xxhash.xxh3_64_intdigest(payload, seed=index) != entry.checksum:
            raise IntegrityError(f"section {index}: the payload was changed on the way")
        geometry, bench = self.header.geometry, _bench()
        section = geometry.section(index)
        try:
            codec = bench.codec(self.header.codings[entry.coding])
            codec.check(geometry)
        except ConfigError as e:
            raise IntegrityError(f"section {index} cannot be decoded: {e}") from None
        try:
            self._unpack(codec, payload, section)
        except _DAMAGE as e:
            said = f"{type(e).__name__}: {e}"
            raise IntegrityError(f"section {index} cannot be decoded: {said}") from e

    def _unpack(self, codec: SectionCodec, payload: memoryview, section: Section) -> None:
        """Decode a section into its place."""
        geometry, bench = self.header.geometry, _bench()
        pieces = list(geometry.pieces(self._view, section))
        rows = _rows(pieces) if geometry.join == 1 else None
        there = codec.has_kernels and runs_kernels(self._view)
        if rows is not None and (there or rows.device.type == "cpu"):
            codec.unpack(payload, rows, section)
            return
        out = bench.scratch.get(
            "page", (section.tokens, geometry.heads, geometry.dim), self._view.dtype
        )
        codec.unpack(payload, out, section)
        for first, last, piece in pieces:
            piece.copy_(out[first:last].view(piece.shape))


class Compressor:
    """Turns tensors of KV cache into frames with one codec, and any frame back. Thread-safe.

    A section that the codec cannot shrink, or whose values it cannot code, is written losslessly.
    Encoding and decoding take at most 64 MiB per worker beyond input and output, and give the
    same bits on every run.

    Args:
        codec: `none`, `lz4`, `zstd`, `lossless`, `int8`, `quant`, … or an installed one.
        workers: Threads that work on one tensor; None: one per core. Sections are at least
            256 tokens of one layer's K or V.
        max_bytes: Largest tensor that `decode` allocates.
        **options: Of the codec.

    Raises:
        ConfigError: No such codec or option.
        BackendUnavailableError: What the codec needs is missing.

    """

    def __init__(
        self, codec: str = "lossless", *, workers: int | None = None, max_bytes: int = 4 << 30,
        **options: Option,
    ) -> None:  # fmt: skip
        if workers is not None and workers < 1:
            raise ConfigError(f"{workers} workers; at least one works")
        lossy = not section_codec_spec(codec).lossless
        fallbacks = _FALLBACKS if lossy else _FALLBACKS[1:] if codec != "none" else ()
        self._codec = create_section_codec(codec, options)
        others = (*self._codec.fallbacks, *(Coding(name, {}) for name in fallbacks))
        self.codings = (Coding(codec, options), *others)
        self._checked: set[tuple[object, ...]] = set()
        self.workers = workers or _cores()
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    @classmethod
    def of(cls, coding: Coding) -> Compressor:
        """One for a coding, which a peer may have named; it works on the caller's thread.

        Raises:
            ConfigError: No such codec or option.
            BackendUnavailableError: What the codec needs is missing.

        """
        options: dict[str, Any] = dict(coding.options)
        if ours := {"codec", "max_bytes", "self", "workers"} & set(options):
            raise ConfigError(f"codec {coding.name!r} has no options {sorted(ours)}")
        return cls(coding.name, workers=1, **options)

    def __enter__(self) -> Compressor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker threads. Idempotent; the next call would start new ones."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool:
            pool.shutdown()

    def encoder(self, tensor: Tensor, layout: TensorLayout) -> Encoder:
        """Code a tensor section by section, as a stream wants it.

        Args:
            tensor: On the CPU or a CUDA GPU, any strides; must not change meanwhile. What has no
                kernels (see `SectionCodec`) goes to the CPU section by section.
            layout: What its dimensions mean.

        Raises:
            ConfigError: They do not fit, or the keys contradict the layout's RoPE.
            LayoutMismatchError: The codec was calibrated for another model or geometry.

        """
        encoder = Encoder(tensor, layout, self.codings, self._codec.join)
        geometry = encoder.header.geometry
        self._codec.check(geometry)
        if layout.rope and self._codec.undoes_rope:
            seen = (layout.rope, layout.axes, layout.model, geometry.heads, geometry.dim)
            if seen not in self._checked:
                judged = check_rope(geometry, encoder.view)
                if judged and len(self._checked) < 64:
                    self._checked.add(seen)
        return encoder

    def encode(self, tensor: Tensor, layout: TensorLayout) -> bytearray:
        """The tensor as one frame; as `encoder`."""
        encoder = self.encoder(tensor, layout)
        header, count = encoder.header, encoder.header.geometry.sections
        frame = bytearray(header.payload_offset)
        frame[: len(header.data)] = header.data
        at = len(header.data)

        def kept(index: int) -> tuple[bytes, Payload]:
            entry, payload = encoder.section(index)
            return entry, bytes(payload) if isinstance(payload, memoryview) else payload

        alone = self.workers == 1 or count < 2  # payloads are taken before the next is made
        for entry, payload in encoder if alone else self._map(kept, count):
            frame[at : at + ENTRY_BYTES] = entry
            at += ENTRY_BYTES
            frame += payload
        return frame

    def decode(
        self, frame: Payload, out: Tensor | None = None, *, layout: TensorLayout | None = None
    ) -> Tensor:
        """The tensor of a frame of any codec.

        Args:
            frame: All of it.
            out: Where to, in place; None allocates. After an error its contents are undefined;
                padding is not written.
            layout: What the frame must be; None takes what it says.

        Raises:
            IntegrityError: Truncated or damaged, or of a codec that is not installed.
            LayoutMismatchError: It does not fit `out` or `layout`.
            ResourceError: It would take more than `max_bytes`.

        """
        import torch

        header, sections = split(memoryview(frame).cast("B"))
        found = header.geometry.layout
        if layout is not None:
            tokens = header.geometry.tokens if layout.tokens is None else layout.tokens
            want = TensorLayout(
                layout.axes, layout.kind, tokens, layout.first_layer, layout.first_position,
                layout.rope, layout.model,
            )  # fmt: skip
            if want != found:
                raise LayoutMismatchError(
                    "the frame has another layout", ours=repr(want), theirs=repr(found)
                )
        if out is None:
            if header.geometry.raw_bytes > self.max_bytes:
                raise ResourceError(
                    f"a frame of {header.geometry.raw_bytes} bytes of values; `max_bytes` allows "
                    f"{self.max_bytes}"
                )
            out = torch.zeros(header.geometry.shape, dtype=getattr(torch, header.dtype))
        decoder = Decoder(header, out)
        for _ in self._map(lambda i: decoder.section(i, *sections[i]), len(sections)):
            pass
        return out

    def _map(self, run: Callable[[int], T], count: int) -> Iterator[T]:
        """Results in order; at most two per worker wait to be taken."""
        if self.workers == 1 or count < 2:
            for i in range(count):
                yield run(i)
            return
        pool = self._threads()
        waiting: deque[Future[T]] = deque()
        try:
            for i in range(count):
                waiting.append(pool.submit(run, i))
                if len(waiting) >= 2 * self.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            for future in waiting:
                if not future.cancelled():
                    future.exception()

    def _threads(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self.workers, "sagellm-codec")
            return self._pool


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _rows(pieces: list[tuple[int, int, Tensor]]) -> Tensor | None:
    """The only piece as a view [tokens, heads, dim]; None where strides allow no such view."""
    if len(pieces) > 1:
        return None
    piece = pieces[0][2]
    if piece.dim() == 3:
        return piece
    if piece.shape[0] > 1 and piece.stride(0) != piece.stride(1) * piece.shape[1]:
        return None
    return piece.flatten(0, 1)


def _gathered(geometry: Geometry, view: Tensor, section: Section, scratch: Scratch) -> Tensor:
    """A section's values as [tokens, heads, dim], copied only where they are scattered."""
    pieces = list(geometry.pieces(view, section))
    if geometry.join == 1 and (rows := _rows(pieces)) is not None:
        return rows
    shape = (section.tokens, geometry.heads, geometry.dim)
    if view.device.type == "cpu":
        out = scratch.get("page", shape, view.dtype)
    else:
        out = view.new_empty(shape)
    for first, last, piece in pieces:
        out[first:last].view(piece.shape).copy_(piece)
    return out
