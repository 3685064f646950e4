"""Blocks that are coded on their way out: pieces are encoded while others are on the wire."""

from __future__ import annotations

import logging
import struct
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import xxhash

from sagellm.core.protocols import CommError, DistributedRuntimeError, KVConnection

from ._coded_link import PIECE_BYTES, LinkCoding
from ._coded_request import CodecRequest
from ._coded_view import CodedUnits, codable, is_values, is_whole
from ._flows import Chunk, Outflow
from .compression._registry import section_codec_spec
from .compression.auto import label
from .compression.frame import Coding
from .frames import block_sums
from .memory import Views
from .transfer import TransferHandle

if TYPE_CHECKING:
    from ._link import Link

__all__ = ["CodedOutflow", "CodedPiece"]

logger = logging.getLogger(__name__)

_LEAST_BYTES = 256 << 10
_EXACT = Coding("lossless")


@dataclass(slots=True)
class CodedPiece:
    """A chunk, encoded.

    Attributes:
        table: Sums of its blocks, zeros where they do not arrive as they are, and the digest of
            the frame's front.
        views: The frame.
        nbytes: Of the frame.
        codec_s: Spent on it.
        done: Gives its memory back; to be called once, when it was sent.

    """

    table: bytes
    views: Views
    nbytes: int
    codec_s: float
    done: Callable[[], object]


class CodedOutflow(Outflow):
    """As an outflow, of chunks that worker threads have encoded ahead.

    Args:
        handle: The transfer.
        tid: Its number on the link.
        request: What its caller asks for.

    """

    def __init__(self, handle: TransferHandle, tid: int, request: CodecRequest) -> None:
        super().__init__(handle, tid)
        self.request = request
        self._allowed = request.allowed()
        self._link: Link | None = None
        self._coding: LinkCoding | None = None
        self._failed: Callable[[CommError], object] = lambda _: None
        self._ready: deque[tuple[Chunk, CodedPiece | None]] = deque()
        self._claimed: dict[Chunk, CodedPiece] = {}
        self._held: Chunk | None = None
        self._in_work = 0
        self._starved = False
        self._mode: Coding | None = None
        self._bytes = 0
        self._piece_bytes = PIECE_BYTES
        self._dtype = ""

    def begin(self, link: Link, nbytes: int, failed: Callable[[CommError], object]) -> None:
        """Know the link, how much moves, and whom to tell that it cannot be encoded."""
        assert link.coding is not None, "the link is up"
        assert self.extent is not None, "granted"
        self._link, self._coding, self._failed = link, link.coding, failed
        self._coding.in_place = link.one_sided
        self._bytes = nbytes
        pieces = 4 * self._coding.codecs.threads.workers
        self._piece_bytes = min(PIECE_BYTES, max(_LEAST_BYTES, nbytes // pieces))
        layers = range(self.extent.layers)
        largest = max(layers, key=lambda i: self._size(i), default=0)
        self._dtype = self.extent.dtype(largest) if self.extent.layers else ""
        self._look()

    def _size(self, layer: int) -> int:
        assert self.extent is not None, "granted"
        return self.extent.units(layer) * self.extent.unit_bytes(layer)

    def _look(self) -> Coding | None:
        assert self._coding is not None, "begun"
        choice = self._coding.choose(self.request, self._allowed, self._dtype, self._bytes)
        if choice.coding != self._mode or not self.handle.codec:
            self.handle.coded_as(label(choice.coding), choice.why)
        self._mode = choice.coding
        return self._mode

    # -- what the writer asks ---------------------------------------------------------------

    def claim(self, first_bytes: int, chunk_bytes: int, lanes: int = 1) -> Chunk | None:
        """The next chunk that is ready to be sent; starts to encode those after it."""
        if self._coding is None or self.stopped:
            return None
        mode = self._look()
        if mode is not None:
            self._fill(mode)
        with self.lock:
            if self.stopped:
                return None
            if self._ready:
                chunk, piece = self._ready.popleft()
                if piece is not None:
                    self._claimed[chunk] = piece
                self._pieces += 1
                return chunk
            if self._held is not None and mode is None:
                chunk, self._held = self._held, None
                self._pieces += 1
                return chunk
        return super().claim(first_bytes, chunk_bytes, lanes) if mode is None else None

    def coded(self, chunk: Chunk) -> CodedPiece | None:
        """The frame of a chunk that was claimed; None for one that goes as it is."""
        with self.lock:
            return self._claimed.pop(chunk, None)

    def sent(self, conn: KVConnection, nbytes: int, seconds: float) -> None:
        """Note a frame that was handed to the kernel."""
        if self._coding is not None:
            self._coding.rate.sent(conn, nbytes, seconds)

    @property
    def waiting(self) -> bool:
        """Whether something is queued that nobody but the writer would look for."""
        with self.lock:
            if self.stopped or self._coding is None:
                return False
            if self._ready:
                return True
            full = self._starved or self._in_work >= self._window
        return super().waiting and (self._mode is None or not full)

    def waiting_bytes(self, most: int) -> int:
        """Bytes that could be sent now."""
        if self._mode is None:
            return super().waiting_bytes(most)
        with self.lock:
            return sum(p.nbytes for _, p in self._ready if p is not None)

    def stop(self) -> bool:
        """Let no further piece begin, and drop what is encoded."""
        with self.lock:
            self.stopped = True
            dropped = [p for _, p in self._ready if p is not None]
            self._ready.clear()
            self._held = None
        for piece in dropped:
            piece.done()
        return super().stop()

    # -- encoding ---------------------------------------------------------------------------

    @property
    def _window(self) -> int:
        """Pieces that are encoded, or being encoded, at once."""
        assert self._coding is not None, "begun"
        return self._coding.codecs.threads.workers + 1

    def _fill(self, mode: Coding) -> None:
        """Start as many pieces as there is room for."""
        assert self._coding is not None, "begun"
        threads = self._coding.codecs.threads
        while True:
            with self.lock:
                self._starved = False
                chunk, self._held = self._held, None
                room = self._in_work + len(self._ready) < self._window
            if chunk is None:
                if not room:
                    return
                chunk = super().claim(self._piece_bytes, self._piece_bytes)
                if chunk is None:
                    return
                self.leave()  # nobody is at the blocks until it is encoded or sent
            if (extent := self.extent) is None:
                return  # it has ended
            if not codable(extent, chunk.layer):
                self._put(chunk, None)
                continue
            raw = extent.span_bytes(*chunk)
            # what it is gathered into, and what comes out, which is never larger
            if not threads.encoding.try_take(2 * raw, self._rouse):
                with self.lock:
                    self._held, self._starved = chunk, True
                return
            with self.lock:
                self._in_work += 1
            if not threads.submit(lambda c=chunk, n=raw: self._encode(c, n, mode)):  # type: ignore[misc]
                threads.encoding.give(2 * raw)
                self._in_work_less()
                return

    def _put(self, chunk: Chunk, piece: CodedPiece | None) -> bool:
        """Have it sent; False when nobody waits for it any more."""
        with self.lock:
            if not self.stopped:
                self._ready.append((chunk, piece))
            return not self.stopped

    def _encode(self, chunk: Chunk, raw: int, mode: Coding) -> None:
        """Encode a piece; on a worker thread."""
        assert self._coding is not None, "begun"
        credits = self._coding.codecs.threads.encoding
        held = 2 * raw
        entered = self.enter()
        try:
            if not entered:
                return
            table, views, codec_s = self._frame(chunk, raw, mode)
            size = sum(map(len, views))
            credits.give(held - size)
            held = 0
            piece = CodedPiece(table, views, size, codec_s, lambda: credits.give(size))
            if not self._put(chunk, piece):
                piece.done()
        except Exception as e:
            if not isinstance(e, CommError | MemoryError):
                logger.exception("a bug in a codec")
            text = f"it cannot be encoded: {type(e).__name__}: {e}"
            self._failed(e if isinstance(e, CommError) else DistributedRuntimeError(text))
        finally:
            self._in_work_less()
            if held:  # first: who sees the transfer ended sees it given back
                credits.give(held)
            if entered:
                self.leave()
            self._rouse()

    def _in_work_less(self) -> None:
        with self.lock:
            self._in_work -= 1

    def _rouse(self) -> None:
        """Have a lane look at this flow again; from any thread."""
        if self._link is not None and not self.stopped:
            self._link.writer.add(self)

    def _frame(self, chunk: Chunk, raw: int, mode: Coding) -> tuple[bytes, Views, float]:
        """Table and frame of a chunk, and the seconds that they took."""
        assert self._coding is not None, "begun"
        assert self.extent is not None, "granted"
        start = time.perf_counter()
        units = CodedUnits(self.extent, chunk.layer, chunk.first, chunk.units)
        lossless = section_codec_spec(mode.name).lossless
        if not lossless and not is_values(self.extent, chunk.layer):
            mode, lossless = _EXACT, True
        layout = units.layout(self.request)
        encoder = self._coding.codecs.compressor(mode).encoder(units.load(), layout)
        entries, payloads = [encoder.header.data], []
        for entry, payload in encoder:
            entries.append(entry)
            payloads.append(memoryview(bytes(payload)))  # it is the thread's scratch
        front = b"".join(entries)
        sums = bytes(8 * chunk.units)
        if lossless and self.checks and is_whole(encoder.header.geometry):
            views = self.extent.unit_views(chunk.layer, chunk.first, chunk.units)
            found = block_sums(views, chunk.layer, chunk.first)
            sums = struct.pack(f"<{chunk.units}Q", *found)
        table = sums + struct.pack("<Q", xxhash.xxh3_64_intdigest(front))
        frame = [memoryview(front), *payloads]
        spent_s = time.perf_counter() - start
        self._coding.coded(mode, self._dtype, raw, sum(map(len, frame)), spent_s)
        return table, frame, spent_s

    @property
    def checks(self) -> bool:
        """Whether blocks are checked one by one."""
        return self._link is not None and self._link.writer.checksum
