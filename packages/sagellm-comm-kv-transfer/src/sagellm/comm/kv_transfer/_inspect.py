"""Questions to peers about what they hold and whom they wait for, and answers to theirs.

They go over the control connection of a link, so that whoever asks has proved the key. An
answer names transfers and blocks and has none of their bytes.
"""

from __future__ import annotations

import itertools
import json
import queue
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sagellm.core.protocols import CommError, CommTimeoutError, DistributedRuntimeError

from . import wire
from ._link import Link
from ._snapshot import cut

if TYPE_CHECKING:
    from ._engine import Engine

__all__ = ["Inquiries"]

_MAX_LISTED = 256
_MAX_WAITING = 64
_MAX_ASKED = 8
"""Questions of one peer that wait for an answer; more are ignored."""
_REST = 9
"""Answers rest so many times as long as the last took: they cost a tenth of the loop at most."""

Told = Callable[[dict[str, Any] | CommError], None]  # Any: JSON


def _report(engine: Engine) -> str:
    """The snapshot, its lists cut to a length that a control message bears, and the counters."""
    snapshot, left_out = cut(engine, _MAX_LISTED)
    pool = engine.pool
    return json.dumps(
        {
            **snapshot,
            "left_out": left_out,
            "pool": None if pool is None else dict(pool.num_blocks),
            "stats": asdict(engine.stats()),
        }
    )


class Inquiries:
    """Questions to peers and their answers. Methods without a note run on the loop.

    Args:
        engine: What peers may ask about.

    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._numbers = itertools.count(1)
        self._open: dict[tuple[Link, int], Told] = {}
        self._asked: dict[Link, list[int]] = {}
        self._rested = 0.0

    def inspect(self, link: Link, timeout_s: float) -> dict[str, Any]:
        """Ask a peer and wait for its answer; off the loop."""
        answers: queue.SimpleQueue[dict[str, Any] | CommError] = queue.SimpleQueue()
        self._engine.loop.run(lambda: self._ask(link, answers.put))
        try:
            answer = answers.get(timeout=timeout_s)
        except queue.Empty:
            text = f"node {link.peer} has not answered in {timeout_s:g} s"
            raise CommTimeoutError(text) from None
        if isinstance(answer, CommError):
            raise answer
        return answer

    def _ask(self, link: Link, told: Told) -> None:
        if link.error is not None:
            told(link.error)
            return
        while len(self._open) >= _MAX_WAITING:  # of peers that never answered
            del self._open[next(iter(self._open))]
        number = next(self._numbers)
        self._open[link, number] = told
        link.send(wire.Ask(number))

    def link_lost(self, link: Link, error: CommError) -> None:
        """Tell those who asked over it, and forget what it asked."""
        self._asked.pop(link, None)
        for name in [n for n in self._open if n[0] is link]:
            self._open.pop(name)(error)

    def on_ask(self, link: Link, message: wire.Ask) -> None:
        """Answer soon, with all others that ask meanwhile."""
        if len(self._asked.get(link, ())) >= _MAX_ASKED:
            self._engine.ignore("ask")
            return
        if not self._asked:
            wait_s = max(0.0, self._rested - time.monotonic())
            self._engine.loop.call_later(wait_s, self._answer)
        self._asked.setdefault(link, []).append(message.number)

    def _answer(self) -> None:
        began = time.monotonic()
        asked, self._asked = self._asked, {}
        if not asked:
            return
        text = _report(self._engine)
        for link, numbers in asked.items():
            for number in numbers:
                link.send(wire.Answer(number, text))
        ended = time.monotonic()
        self._rested = ended + _REST * (ended - began)

    def on_answer(self, link: Link, message: wire.Answer) -> None:
        """Hand over what was asked for; what was not is no reason to end the link."""
        told = self._open.pop((link, message.number), None)
        if told is None:
            return
        try:
            report = json.loads(message.text)
        except (ValueError, RecursionError):
            report = None
        if isinstance(report, dict):
            told(report)
            return
        error = DistributedRuntimeError(f"node {link.peer}: its report is no JSON object")
        told(error)
        link.lose(error)
