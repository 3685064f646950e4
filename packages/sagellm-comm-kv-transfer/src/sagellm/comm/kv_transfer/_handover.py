"""Bases that a peer needs, given to it before the first frame that is coded with them.

Over the control connection, whose messages are sealed: the sender offers a basis, the receiver
wants it from some byte on, and pieces follow, a few ahead of what has come. The receiver checks
all of it, fingerprint included, before it keeps it; then it wants it from its end on, as it does
at once when it holds the basis already. What needs the basis waits meanwhile, within its own
deadline, and fails with the receiver's error where that one refuses.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import xxhash

from sagellm.core.protocols import (
    CommError,
    CommTimeoutError,
    ConfigError,
    DistributedRuntimeError,
    IntegrityError,
    ResourceError,
    error_from_code,
)

from . import wire
from ._link import Link
from ._push import Push
from ._records import MAX_MESSAGE, code_of
from .compression.basis import Basis
from .compression.basis_store import BASES

if TYPE_CHECKING:
    from ._engine import Engine

__all__ = ["Handover"]

logger = logging.getLogger(__name__)

_PIECE_BYTES = 256 << 10
_LEAST_PIECE_BYTES = 256
_AHEAD = 4
"""Pieces under way at once: a megabyte, so that other messages do not wait long behind it."""
_MAX_NAME = 64
_MAX_TAKEN = 64
"""Bases that are taken at once; more are refused."""


@dataclass(slots=True)
class _Giving:
    """A basis on its way out, and the pushes that wait for it."""

    data: memoryview
    waiting: list[Push] = field(default_factory=list)
    had: int = 0
    sent: int = 0


@dataclass(slots=True)
class _Taking:
    """A basis on its way in, from one link; others offer the same one."""

    link: Link
    nbytes: int
    others: dict[Link, int] = field(default_factory=dict)
    data: bytearray = field(default_factory=bytearray)
    moved: float = field(default_factory=time.monotonic)
    whole: bool = False


class Handover:
    """Gives bases to peers, and takes theirs. Methods without a note run on the event loop.

    Attributes:
        store: Where they come from, and where they are kept.

    Args:
        engine: The channel's engine.

    """

    def __init__(self, engine: Engine) -> None:
        self.store = BASES
        self._engine = engine
        self._giving: dict[tuple[Link, str], _Giving] = {}
        self._taking: dict[str, _Taking] = {}

    # -- giving -----------------------------------------------------------------------------

    def needed(self, p: Push, link: Link) -> str | None:
        """The basis that the peer does not have yet and a push needs; from any thread."""
        if p.codec is None or link.coding is None or not link.coding.takes_bases:
            return None
        basis = p.codec.options.get("basis")
        in_place = link.one_sided and not p.codec.required  # then nothing is coded
        if not isinstance(basis, str) or in_place or basis in link.coding.given:
            return None
        return basis

    def give(self, p: Push, link: Link, basis: str) -> None:
        """Give a basis, and then go on with the push."""
        giving = self._giving.get((link, basis))
        if giving is None:
            try:
                data = self.store.data(basis)
            except ConfigError as e:
                self._engine.sending.fail(p, e)
                return
            giving = self._giving[link, basis] = _Giving(memoryview(data))
            link.send(wire.BasisOffer(basis, len(data)))
        giving.waiting = [other for other in giving.waiting if other.error is None]
        giving.waiting.append(p)

    def on_wanted(self, link: Link, m: wire.BasisWanted) -> None:
        """The peer has a basis up to some byte; at its end it has checked and kept it."""
        giving = self._giving.get((link, m.basis))
        if giving is None:
            self._engine.ignore("basis_wanted")
            return
        size = len(giving.data)
        if m.offset == size:
            self._given(link, m.basis)
            return
        if not giving.had <= m.offset <= giving.sent or m.piece_bytes < _LEAST_PIECE_BYTES:
            text = f"node {link.peer} wants pieces of {m.piece_bytes} from {m.offset} of a basis"
            link.lose(DistributedRuntimeError(f"{text} of {size}; {giving.sent} are sent"))
            return
        giving.had = m.offset
        piece = min(m.piece_bytes, _PIECE_BYTES)
        end = min(size, m.offset + _AHEAD * piece)
        while giving.sent < end and link.error is None:
            at, giving.sent = giving.sent, min(end, giving.sent + piece)
            link.send(wire.BasisPiece(m.basis, at, bytes(giving.data[at : giving.sent])))

    def _given(self, link: Link, basis: str) -> None:
        assert link.coding is not None, "the link is up"
        link.coding.given.add(basis)
        link.coding.refused.pop(basis, None)
        self._resume(link, basis)

    def on_refused(self, link: Link, m: wire.BasisRefused) -> None:
        """The peer does not take a basis: what cannot do without it fails."""
        giving = self._giving.get((link, m.basis))
        if giving is None or link.coding is None:
            self._engine.ignore("basis_refused")
            return
        error = error_from_code(m.code, m.message[:MAX_MESSAGE])
        link.coding.refused[m.basis] = str(error)
        for p in giving.waiting:
            if p.codec is not None and p.codec.required:
                self._engine.sending.fail(p, error)
        self._resume(link, m.basis)

    def _resume(self, link: Link, basis: str) -> None:
        """Go on with what has waited and not failed."""
        for p in self._giving.pop((link, basis)).waiting:
            self._engine.sending.move(p, link)

    # -- taking -----------------------------------------------------------------------------

    def on_offer(self, link: Link, m: wire.BasisOffer) -> None:
        """A peer is about to use a basis."""
        taking = self._taking.get(m.basis)
        if m.basis in self.store:
            link.send(wire.BasisWanted(m.basis, m.nbytes))
        elif taking is None:
            self._take(link, m.basis, m.nbytes)
        elif taking.link is link or link in taking.others:
            link.lose(DistributedRuntimeError(f"node {link.peer} offers a basis twice"))
        else:
            taking.others[link] = m.nbytes

    def _take(self, link: Link, basis: str, nbytes: int) -> None:
        """Let a peer send a basis, if there is room for it."""
        coming = sum(t.nbytes for t in self._taking.values())
        room = self.store.free_bytes - coming
        node = self._engine.node_id
        error: CommError | None = None
        if not 0 < len(basis) <= _MAX_NAME or nbytes < 1:
            error = ConfigError(f"a basis {basis[:_MAX_NAME]!r} of {nbytes} bytes")
        elif nbytes > room or len(self._taking) >= _MAX_TAKEN:
            error = ResourceError(
                f"node {node} has no room for basis {basis[:12]} of {nbytes} bytes: its store "
                f"takes {room} more of {self.store.max_bytes}, and {len(self._taking)} are on "
                "their way; drop one there"
            )
        if error is not None:
            self._refuse(link, basis, error)
            return
        taking = self._taking[basis] = _Taking(link, nbytes)
        self._watch(basis, taking, self._engine.settings.io_timeout_s)
        self._want(link, basis, 0)

    def _want(self, link: Link, basis: str, offset: int) -> None:
        # half of what a message may be, for its names and seal
        most = min(_PIECE_BYTES, self._engine.settings.max_message_bytes // 2)
        link.send(wire.BasisWanted(basis, offset, most))

    def _refuse(self, link: Link, basis: str, error: CommError) -> None:
        logger.warning("a basis of node %d is refused: %s", link.peer, error)
        message = str(error)[:MAX_MESSAGE]
        link.send(wire.BasisRefused(basis[:_MAX_NAME], code_of(error), message))

    def on_piece(self, link: Link, m: wire.BasisPiece) -> None:
        """Some more of a basis has come."""
        taking = self._taking.get(m.basis)
        if taking is None or taking.link is not link or taking.whole:
            self._engine.ignore("basis_piece")
            return
        had = len(taking.data)
        if m.offset != had or not 0 < len(m.data) <= taking.nbytes - had:
            text = f"node {link.peer} sends {len(m.data)} bytes of a basis for {m.offset}"
            link.lose(DistributedRuntimeError(f"{text}; it has sent {had} of {taking.nbytes}"))
            return
        taking.data += m.data
        taking.moved = time.monotonic()
        if len(taking.data) < taking.nbytes:
            self._want(link, m.basis, len(taking.data))
            return
        taking.whole = True
        self._engine.codecs.threads.submit(lambda: self._check(m.basis, taking))

    def _check(self, basis: str, taking: _Taking) -> None:
        """Check a basis and keep it; on a codec's thread, for large ones take seconds."""
        error: CommError | None = None
        try:
            data = bytes(taking.data)
            found = xxhash.xxh3_128_hexdigest(data)
            if found != basis:
                raise IntegrityError(f"basis {found} came in place of {basis}")
            self.store.put(Basis(data, max_bytes=self.store.max_bytes))
        except CommError as e:
            error = e
        except Exception as e:
            logger.exception("a basis of node %d", taking.link.peer)
            error = DistributedRuntimeError(f"basis {basis}: {type(e).__name__}: {e}")
        self._engine.loop.call(lambda: self._checked(basis, taking, error))

    def _checked(self, basis: str, taking: _Taking, error: CommError | None) -> None:
        if error is not None:
            self._drop(basis, taking, error)
            return
        del self._taking[basis]
        logger.info("basis %s came from node %d", basis, taking.link.peer)
        for link, nbytes in {taking.link: taking.nbytes, **taking.others}.items():
            link.send(wire.BasisWanted(basis, nbytes))

    def _drop(self, basis: str, taking: _Taking, error: CommError | None) -> None:
        """Give up on one peer's basis, and let the next send it that offers the same."""
        del self._taking[basis]
        if error is not None:
            self._refuse(taking.link, basis, error)
        for link, nbytes in taking.others.items():
            self.on_offer(link, wire.BasisOffer(basis, nbytes))

    def _watch(self, basis: str, taking: _Taking, wait_s: float) -> None:
        self._engine.loop.call_later(wait_s, lambda: self._look(basis, taking))

    def _look(self, basis: str, taking: _Taking) -> None:
        """Give up on a basis of which nothing has come for too long."""
        if self._taking.get(basis) is not taking or taking.whole:
            return
        limit = self._engine.settings.io_timeout_s
        left = taking.moved + limit - time.monotonic()
        if left > 0:
            self._watch(basis, taking, left)
            return
        had = f"{len(taking.data)} of {taking.nbytes} bytes of basis {basis[:12]} came"
        error = CommTimeoutError(f"{had} from node {taking.link.peer}, and none for {limit:g} s")
        self._drop(basis, taking, error)

    def link_lost(self, link: Link) -> None:
        """Forget what went over a link; what waits for it fails with the link."""
        for name in [n for n in self._giving if n[0] is link]:
            del self._giving[name]
        for basis, taking in list(self._taking.items()):
            taking.others.pop(link, None)
            if taking.link is link and not taking.whole:
                self._drop(basis, taking, None)
