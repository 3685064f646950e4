"""One-way rings of frames between two ranks: one writes, one reads, neither locks.

The first three words of a ring, a cache line apart, count bytes: HEAD those written, TAIL those
read, MATCHED those of small messages that a receive has taken. A frame is a header of four words
(kind, message, tag, bytes) and its payload, padded to 8 bytes; it never wraps around: what is left
at the end of the ring is skipped.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Protocol

import torch
from torch import Tensor

from sagellm.core.protocols import BackendUnavailableError

from .identity import machine
from .layout import Layout
from .native_library import library

__all__ = [
    "ANNOUNCE",
    "CLEAR",
    "DATA",
    "SMALL",
    "Frame",
    "Ring",
    "Words",
    "segment_words",
]

HEAD, TAIL, MATCHED = 0, 64, 128
_START = 256
HEADER = 32
SMALL, ANNOUNCE, CLEAR, DATA, _SKIP = 1, 2, 3, 4, 5
"""A whole message; one that is to come; leave to send it; a part of it."""

Frame = tuple[int, int, int, int, Tensor]
"""Kind, message, tag, bytes of the payload or of the announced message, payload where it lies."""


class Words(Protocol):
    """Loads with acquire and stores with release order of the segment's 64-bit words."""

    def load(self, offset: int) -> int:
        """The word at a byte offset."""
        ...

    def store(self, offset: int, value: int) -> None:
        """Set the word at a byte offset."""
        ...


class _PlainWords:
    """x86-64 keeps the order of stores and of loads, and a word is moved at once."""

    def __init__(self, memory: mmap.mmap) -> None:
        view = memoryview(memory)
        self._words = view[: len(view) // 8 * 8].cast("q")

    def load(self, offset: int) -> int:
        return self._words[offset >> 3]

    def store(self, offset: int, value: int) -> None:
        self._words[offset >> 3] = value


class _OrderedWords:
    """Loads and stores by the compiled library, for machines that reorder them."""

    def __init__(self, memory: mmap.mmap, lib: ctypes.PyDLL) -> None:
        self._anchor = ctypes.c_char.from_buffer(memory)
        self._base = ctypes.addressof(self._anchor)
        self._load, self._store = lib.sage_shm_load_acquire, lib.sage_shm_store_release

    def load(self, offset: int) -> int:
        return int(self._load(self._base + offset))

    def store(self, offset: int, value: int) -> None:
        self._store(self._base + offset, value)


def segment_words(memory: mmap.mmap) -> Words:
    """The words of a segment, in the way that this machine needs.

    Raises:
        BackendUnavailableError: It needs the compiled library, which is not there.

    """
    if machine() == "x86_64":
        return _PlainWords(memory)
    found = library()
    if isinstance(found, str):
        raise BackendUnavailableError(f"messages over shm need the native engine: {found}")
    return _OrderedWords(memory, found.held)


class Ring:
    """The ring that `src` writes and `dst` reads."""

    def __init__(self, memory: mmap.mmap, words: Words, layout: Layout, src: int, dst: int) -> None:
        base = layout.mailbox(src, dst)
        self.room = (layout.mailbox_bytes - _START) // HEADER * HEADER
        self._base = base
        self._words = words
        self._view = memoryview(memory)[base + _START : base + _START + self.room]
        self._header = self._view.cast("q")
        self._bytes = torch.frombuffer(self._view, dtype=torch.uint8)
        self._head = words.load(base + HEAD)
        self._tail = words.load(base + TAIL)
        self.matched = 0

    # -- the writer ---------------------------------------------------------------------------

    def space(self) -> int:
        """Payload bytes that fit into one frame now; negative when not even a header does."""
        at = self._head % self.room
        free = self.room - (self._head - self._words.load(self._base + TAIL))
        to_end = self.room - at
        if free <= to_end:
            return free - HEADER
        # Behind the end lies more: worth skipping to only when it is the larger part.
        return max(to_end, free - to_end) - HEADER

    def write(self, kind: int, message: int, tag: int, count: int, payload: Tensor | None) -> None:
        """Put a frame; the caller knows from `space` that it fits."""
        nbytes = 0 if payload is None else payload.numel()
        need = HEADER + -(-nbytes // HEADER) * HEADER
        at = self._head % self.room
        if self.room - at < need:
            self._header[at // 8] = _SKIP
            self._head += self.room - at
            at = 0
        word = at // 8
        self._header[word] = kind
        self._header[word + 1] = message
        self._header[word + 2] = tag
        self._header[word + 3] = count
        if payload is not None:
            self._bytes[at + HEADER : at + HEADER + nbytes].copy_(payload)
        self._head += need
        self._words.store(self._base + HEAD, self._head)

    def taken(self) -> int:
        """Bytes of small messages that the reader's receives have taken."""
        return self._words.load(self._base + MATCHED)

    # -- the reader ---------------------------------------------------------------------------

    def peek(self) -> Frame | None:
        """The next frame; its payload lies in the ring until `drop`."""
        while self._tail < self._words.load(self._base + HEAD):
            at = self._tail % self.room
            word = at // 8
            kind = self._header[word]
            if kind == _SKIP:
                self._tail += self.room - at
                self._words.store(self._base + TAIL, self._tail)
                continue
            count = self._header[word + 3]
            inside = count if kind in (SMALL, DATA) else 0
            payload = self._bytes[at + HEADER : at + HEADER + inside]
            return kind, self._header[word + 1], self._header[word + 2], count, payload
        return None

    def drop(self, frame: Frame) -> None:
        """Give the frame's room back to the writer."""
        nbytes = frame[4].numel()
        self._tail += HEADER + -(-nbytes // HEADER) * HEADER
        self._words.store(self._base + TAIL, self._tail)

    def take(self, nbytes: int) -> None:
        """Tell the writer that a receive has taken a small message."""
        self.matched += nbytes
        self._words.store(self._base + MATCHED, self.matched)
