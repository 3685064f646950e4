"""Finding out who is missing once a group has failed.

Torch's libraries say "connection closed" or "timed out" and name no rank. Every rank that
notices a failure posts it to the group's store and closes its connections, so that the others
notice within moments and post too: whoever has not posted after a grace period is the one.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from sagellm.core.protocols.errors import (
    CommError,
    CommTimeoutError,
    DistributedRuntimeError,
    PeerLostError,
)

from .transport import Position, TorchObject

__all__ = ["FailureBoard", "classify", "say_positions"]

logger = logging.getLogger(__name__)

GRACE_S = 0.6
"""How long survivors are given to post. Propagation was 1-20 ms on loopback, 2-core x86-64."""

_TIMEOUT_TEXTS = ("timed out", "timeout waiting", "wait timeout")
_LOST_TEXTS = (
    "connection closed",
    "connection reset",
    "connection refused",
    "broken pipe",
    "caused pair closure",
    "socket closed",
    "remote process exited",
    "peer closed",
)


def classify(error: BaseException) -> str:
    """The code of the error class that a library's exception stands for.

    >>> classify(RuntimeError("Connection closed by peer [127.0.0.1]:1"))
    'peer_lost'
    >>> classify(RuntimeError("Timed out waiting 1000ms for recv operation to complete"))
    'comm_timeout'
    """
    if isinstance(error, CommError):
        return error.code
    text = str(error).lower()
    if any(mark in text for mark in _LOST_TEXTS):
        return PeerLostError.code
    if any(mark in text for mark in _TIMEOUT_TEXTS):
        return CommTimeoutError.code
    return DistributedRuntimeError.code


_ASKED_ABOUT = (CommTimeoutError.code, PeerLostError.code, DistributedRuntimeError.code)


class FailureBoard:
    """What each rank of one group posted about its failure, in the group's store."""

    def __init__(self, store: TorchObject, rank: int, global_ranks: tuple[int, ...]) -> None:
        self.store = store  # torch Store, None where the group does not show it
        self._rank = rank
        self._global_ranks = global_ranks
        self._posted = False
        self.position: Callable[[], Position | None] = _nowhere
        """Where this rank stands; posted with its failure."""
        self.positions: dict[int, Position | None] = {}
        """Where the others stood when they failed; None for ranks that gave no sign."""

    def post(self, code: str, text: str) -> None:
        """Leave word for the others, once; a store that cannot be reached is no new failure."""
        if self._posted or self.store is None or len(self._global_ranks) == 1:
            return
        self._posted = True
        post: dict[str, object] = {"code": code, "text": text[:500]}
        here = self.position()
        if here is not None:
            post |= {"collective": here.collective, "op": here.op, "state": here.state}
        message = json.dumps(post)
        _bounded(lambda: self.store.set(self._key(self._rank), message) and None)

    def verdict(self, describe: str, code: str, error: Exception) -> Exception:
        """The error to raise: names the ranks that did not post, or the first that did."""
        if isinstance(error, CommError) and code not in _ASKED_ABOUT:
            return error  # already says what happened: a mismatch, a broken message
        posts = self._collect()
        if posts is None:
            return _named(code, f"{describe}: {error}", None)
        everyone = range(len(self._global_ranks))
        self.positions = {r: _position(posts.get(r, {})) for r in everyone if r != self._rank}
        missing = [r for r in range(len(self._global_ranks)) if r not in posts and r != self._rank]
        late = any(post["code"] == CommTimeoutError.code for post in posts.values())
        timed_out = code == CommTimeoutError.code or (code == PeerLostError.code and late)
        who = ", ".join(f"{r} (global {self._global_ranks[r]})" for r in missing)
        if missing and timed_out:
            return CommTimeoutError(
                f"{describe}: no sign of rank {who} before the deadline: {error}{self._where()}"
            )
        if missing and code == PeerLostError.code:
            text = f"{describe}: lost rank {who}: {error}{self._where()}"
            return PeerLostError(text, rank=self._global_ranks[missing[0]])
        causes = {r: p for r, p in sorted(posts.items()) if p["code"] != PeerLostError.code}
        if code == PeerLostError.code and causes:
            first, post = next(iter(causes.items()))
            text = (
                f"{describe}: rank {first} left the group: {post['code']}: {post['text']}"
                f"{self._where()}"
            )
            return PeerLostError(text, rank=self._global_ranks[first])
        return _named(code, f"{describe}: {error}{self._where()}", None)

    def _where(self) -> str:
        """The end of a message when ranks stand at different calls; nothing when they do not."""
        text = say_positions({**self.positions, self._rank: self.position()})
        return f"; {text}" if text else ""

    def _key(self, rank: int) -> str:
        return f"sagellm/failed/{rank}"

    def _collect(self) -> dict[int, dict[str, Any]] | None:
        """Posts of the other ranks within the grace period; None when the store is gone."""
        if self.store is None:
            return None
        others = [r for r in range(len(self._global_ranks)) if r != self._rank]
        posts: dict[int, dict[str, Any]] = {}  # JSON of the other ranks
        reached = threading.Event()

        def gather() -> None:
            end = time.monotonic() + GRACE_S
            while len(posts) < len(others) and time.monotonic() < end:
                for rank in others:
                    if rank not in posts and self.store.check([self._key(rank)]):
                        posts[rank] = json.loads(self.store.get(self._key(rank)))
                reached.set()
                time.sleep(0.005)

        _bounded(gather)
        return dict(posts) if reached.is_set() else None


def say_positions(positions: Mapping[int, Position | None]) -> str:
    """Who stands where, the last first; empty when nobody is known to be behind another.

    >>> say_positions({0: Position(42, "barrier", "started"), 1: Position(42, "barrier", "started"),
    ...                3: Position(41, "all_reduce", "completed")})
    'rank 3 is at collective #41 all_reduce (completed), ranks 0, 1 at #42 barrier'
    """
    known: dict[tuple[int, str], list[int]] = {}
    states: dict[tuple[int, str], str] = {}
    for rank, position in sorted(positions.items()):
        if position is not None:
            at = (position.collective, position.op)
            known.setdefault(at, []).append(rank)
            states[at] = position.state
    if len(known) < 2:
        return ""
    parts: list[str] = []
    for at in sorted(known):
        ranks = ", ".join(map(str, known[at]))
        who = f"rank {ranks}" if len(known[at]) == 1 else f"ranks {ranks}"
        verb = "" if parts else " is" if len(known[at]) == 1 else " are"
        place = f"collective #{at[0]} {at[1]}" if not parts else f"#{at[0]} {at[1]}"
        done = " (completed)" if states[at] == "completed" else ""
        parts.append(f"{who}{verb} at {place}{done}")
    return ", ".join(parts)


def _position(post: Mapping[str, Any]) -> Position | None:
    collective, op, state = (post.get(key) for key in ("collective", "op", "state"))
    if isinstance(collective, int) and isinstance(op, str) and isinstance(state, str):
        return Position(collective, op[:100], state[:20])
    return None


def _nowhere() -> Position | None:
    return None


def _named(code: str, text: str, rank: int | None) -> CommError:
    if code == CommTimeoutError.code:
        return CommTimeoutError(text)
    if code == PeerLostError.code:
        return PeerLostError(text, rank=rank)
    return DistributedRuntimeError(text)


def _bounded(task: Callable[[], None]) -> None:
    """Run store traffic on a thread, for no longer than the grace: the store's host may be dead."""

    def guarded() -> None:
        try:
            task()
        except Exception as e:  # the store may be gone with its host, in any of torch's classes
            logger.debug("the group's store cannot be reached: %s", e)

    thread = threading.Thread(target=guarded, name="sagellm-comm-board", daemon=True)
    thread.start()
    thread.join(GRACE_S + 0.1)
