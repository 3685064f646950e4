"""What codecs can do on one link: what both ends have, and what pays at its rate."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from typing import NamedTuple

from sagellm.core.protocols import CommError

from ._coded_request import AUTO, CodecRequest
from ._coded_threads import CodecThreads
from ._link_rate import LinkRate
from .compression import Compressor
from .compression._registry import BASIS, FRAME, coded_versions, section_codec_spec
from .compression.auto import UNBOUNDED, Speed, choose, label
from .compression.frame import Coding
from .compression.speeds import CodecSpeeds

__all__ = ["PIECE_BYTES", "Choice", "Codecs", "LinkCoding", "assumed_rate"]

logger = logging.getLogger(__name__)

PIECE_BYTES = 2 << 20
"""Values of one frame: a megabyte of K and one of V, which keeps threads apart and links busy."""

_LOOK_S = 0.02
_LOAD_S = 1.0
_NEW = 0.3
_RECENT_S = 5.0
"""For how long this host is taken to code as slowly as it did last."""
_MOST_COMPRESSORS = 64


_NETWORK, _HERE = 125e6, 2e9


def assumed_rate(address: str) -> float:
    """Bytes per second to take for the link to a peer's `host:port` until it is measured."""
    host = address.rpartition(":")[0].strip("[]")
    return _HERE if host == "localhost" or host.startswith("127.") or host == "::1" else _NETWORK


class Choice(NamedTuple):
    """A codec that is used now, and why; None sends bytes as they are."""

    coding: Coding | None
    why: str


_IN_PLACE = Choice(None, "none: the peer reads memory in place")


class Codecs:
    """The codecs of one channel: threads, speeds, and a compressor per coding. Thread-safe.

    Args:
        name: Prefix of the threads' names.
        workers: Threads at most; 0 takes one per core, and no more than 4.
        limit: Bytes that each direction may hold.

    """

    def __init__(self, name: str, workers: int, limit: int) -> None:
        self.cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (
            os.cpu_count() or 1
        )  # fmt: skip
        self.threads = CodecThreads(name, workers or min(4, self.cores), limit)
        self.speeds = CodecSpeeds()
        self.versions = coded_versions()
        self._lock = threading.Lock()
        self._compressors: dict[tuple[object, ...], Compressor] = {}
        self._asked: set[tuple[str, str]] = set()
        self._load = (0.0, 0.0, 1)
        self._pace = (1.0, 0.0)

    def compressor(self, coding: Coding) -> Compressor:
        """The one for a coding; its own threads are never used."""
        key = coding.key
        with self._lock:
            found = self._compressors.get(key)
            if found is None:
                if len(self._compressors) >= _MOST_COMPRESSORS:
                    self._compressors.clear()
                found = self._compressors[key] = Compressor.of(coding)
            return found

    def speed(self, coding: Coding, dtype: str) -> Speed | None:
        """How fast a codec is here; None until it has been measured, which this begins."""
        if (known := self.speeds.get(coding, dtype)) is not None:
            return known
        with self._lock:
            key = (label(coding), dtype)
            if key in self._asked:
                return None
            self._asked.add(key)
        self.threads.submit(lambda: self._learn(coding, dtype))
        return None

    def _learn(self, coding: Coding, dtype: str) -> None:
        try:
            self.speeds.learn(coding, dtype)
        except CommError as e:
            logger.warning("codec %s is not considered: %s", label(coding), e)

    def took(self, coding: Coding, dtype: str, raw: int, seconds: float) -> None:
        """Note how long one thread took for so many bytes."""
        if (known := self.speeds.get(coding, dtype)) is not None:
            part = min(1.0, raw / max(seconds, 1e-9) / known.encode_bytes_per_s)
            before = self.pace()
            with self._lock:
                self._pace = (before + _NEW * (part - before), time.monotonic())

    def pace(self) -> float:
        """The part of its measured speed that this host has, for it does other work, too."""
        with self._lock:
            part, at = self._pace
        return part if time.monotonic() - at < _RECENT_S else 1.0

    def free_workers(self) -> int:
        """Threads that find a core which no other process uses, at least one."""
        now, spent = time.monotonic(), time.process_time()
        with self._lock:
            then, before, free = self._load
            if now - then < _LOAD_S:
                return free
            ours = (spent - before) / (now - then) if then else 0.0
            others = max(0.0, os.getloadavg()[0] - ours)
            free = max(1, min(self.threads.workers, round(self.cores - others)))
            self._load = (now, spent, free)
            return free

    def close(self) -> None:
        """End the threads. Idempotent."""
        self.threads.close()


class LinkCoding:
    """The codecs that both ends of a link have, and the choice among them. Thread-safe.

    Args:
        codecs: Ours.
        peer: Node at the other end.
        theirs: Its codecs and their versions.
        assumed_bytes_per_s: Rate of the link before it is measured.

    """

    def __init__(
        self, codecs: Codecs, peer: int, theirs: Mapping[str, int], assumed_bytes_per_s: float
    ) -> None:
        self.codecs = codecs
        self.rate = LinkRate(assumed_bytes_per_s)
        self.in_place = False
        """Whether the peer reads our memory, which no codec makes faster."""
        self.takes_bases = theirs.get(BASIS) == 1
        """Whether the peer takes bases that it does not have."""
        self.given: set[str] = set()
        """Bases that the peer has."""
        self.refused: dict[str, str] = {}
        """Bases that it did not take, and why."""
        self._peer = peer
        self._theirs = theirs
        self._lock = threading.Lock()
        self._choices: dict[tuple[object, ...], tuple[float, Choice]] = {}
        self._ratios: dict[tuple[str, str], float] = {}
        self._last = ""

    def missing(self, coding: Coding) -> str | None:
        """Why the peer cannot decode this; None when it can."""
        for name in (FRAME, *(c.name for c in self.codecs.compressor(coding).codings)):
            ours, theirs = self.codecs.versions.get(name), self._theirs.get(name)
            if ours != theirs:
                what = "coded frames" if name == FRAME else f"codec {name!r}"
                has = "does not have it" if theirs is None else f"has version {theirs}"
                known = sorted(n for n in self._theirs if n not in (FRAME, BASIS))
                return (
                    f"node {self._peer} cannot decode {what} version {ours}: it {has}; it has "
                    f"{', '.join(known) or 'none'}; use one of these or codec='auto'"
                )
        return None

    def lacks(self, request: CodecRequest) -> str | None:
        """Why the peer cannot decode the codec that is asked for; None when it can."""
        if request.codec == AUTO or not request.required:
            return None
        return next((why for c in request.allowed() if (why := self.missing(c))), None)

    def choose(
        self, request: CodecRequest, allowed: tuple[Coding, ...], dtype: str, nbytes: int
    ) -> Choice:
        """What is to be used now."""
        if request.codec != AUTO:
            return self._named(request, allowed[0])
        if self.in_place:
            self._last = _IN_PLACE.why
            return _IN_PLACE
        key = (*map(label, allowed), dtype, nbytes.bit_length())
        now = time.monotonic()
        with self._lock:
            at, present = self._choices.get(key, (-1.0, Choice(None, "")))
        if now - at < _LOOK_S:
            return present
        found = self._look(allowed, dtype, nbytes, present.coding)
        with self._lock:
            if len(self._choices) > 256:
                self._choices.clear()
            self._choices[key] = (now, found)
            self._last = found.why
        return found

    def _named(self, request: CodecRequest, coding: Coding) -> Choice:
        if request.required:
            return Choice(coding, f"{label(coding)}, as asked")
        if self.in_place:
            return _IN_PLACE
        if (why := self.missing(coding)) is not None:
            return Choice(None, f"none: {why}")
        if (why := self.refused.get(str(coding.options.get("basis")))) is not None:
            return Choice(None, f"none: {why}")
        return Choice(coding, f"{label(coding)}, as the channel's settings say")

    def _look(
        self, allowed: tuple[Coding, ...], dtype: str, nbytes: int, present: Coding | None
    ) -> Choice:
        speeds: list[tuple[Coding, Speed]] = []
        slower = self.codecs.pace()
        notes = []
        for coding in allowed:
            if self.missing(coding) is not None:
                notes.append(f"the peer has no {coding.name}")
            elif (speed := self.codecs.speed(coding, dtype)) is None:
                notes.append(f"{label(coding)} is being measured")
            else:
                seen = self._ratios.get((label(coding), dtype), speed.ratio)
                e, d = speed.encode_bytes_per_s * slower, speed.decode_bytes_per_s * slower
                speeds.append((coding, Speed(seen, e, d)))
        if not all(section_codec_spec(c.name).lossless for c in allowed):
            notes.append(UNBOUNDED)
        best, why = choose(
            nbytes,
            self.rate.bytes_per_s,
            speeds,
            workers=self.codecs.free_workers(),
            piece_bytes=PIECE_BYTES,
            present=present,
        )
        known = "measured" if self.rate.measured else "assumed"
        more = f"; {', '.join(notes)}" if notes else ""
        return Choice(best, f"{label(best)}: {why} ({known}){more}")

    def coded(self, coding: Coding, dtype: str, raw: int, coded: int, seconds: float) -> None:
        """Note what came of a piece, and how long one thread took for it."""
        self.codecs.took(coding, dtype, raw, seconds)
        key = (label(coding), dtype)
        with self._lock:
            old = self._ratios.get(key, raw / max(1, coded))
            self._ratios[key] = 1 / ((1 - _NEW) / old + _NEW * coded / max(1, raw))

    def explain(self) -> str:
        """The latest choice of `auto`, in words; empty where there was none."""
        return self._last
