"""What a channel is made of: its links, its two directions, and the loop that owns them."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TypeVar

from sagellm.core.protocols import (
    CommError,
    CommTimeoutError,
    Completion,
    DistributedRuntimeError,
    KVLayout,
    KVTransferError,
    PeerLostError,
    TransferKey,
    TransferStats,
)

from . import wire
from ._arguments import MAX_ID_CHARACTERS
from ._coded_link import Codecs
from ._handover import Handover
from ._inspect import Inquiries
from ._link import Link
from ._links import Links
from ._loop import EventLoop
from ._meters import Meters
from ._paths import Paths
from ._push import Offered, Push
from ._receive import Receive
from ._receiving import Receiving
from ._records import (
    ABANDONED,
    CANCELLED,
    MAX_MESSAGE,
    CompletionQueue,
    error_of,
    key_failure,
)
from ._room import Pressed, Room
from ._sending import Sending
from .discovery import Discovery
from .pool import RegisteredPool
from .settings import KVTransferSettings
from .tls import Tls
from .transfer import TransferHandle
from .transports.tcp import listen

__all__ = ["Engine"]

T = TypeVar("T")


class Engine:
    """Links and transfers of one node. Methods without a note run on the event loop.

    Args:
        discovery: Who we are and where the others are.
        settings: Bounds and choices.
        paths: What moves the blocks.
        host: Address to listen on.
        port: Port to listen on; 0 lets the kernel choose.
        advertise: Host that peers are told.
        tls: Our side of TLS, when it is asked for.

    """

    def __init__(
        self,
        discovery: Discovery,
        settings: KVTransferSettings,
        paths: Paths,
        *,
        host: str,
        port: int,
        advertise: str,
        tls: Tls | None = None,
    ) -> None:
        listener = listen(host, port)  # first: it is what may fail
        self.discovery = discovery
        self.node_id = discovery.node_id
        self.settings = settings
        self.paths = paths
        self.pool: RegisteredPool | None = None
        self.completions = CompletionQueue(settings.max_remembered)
        self.loop = EventLoop(f"kv-node-{self.node_id}")
        self.waiting = Room(settings.max_waiting_bytes)
        self.invited = Room(settings.max_invited_bytes)
        self.control = Pressed(settings.max_control_bytes)
        self.receiving = Receiving(self)
        self.sending = Sending(self)
        self.inquiries = Inquiries(self)
        self.handover = Handover(self)
        self.meters = Meters()
        self.codecs = Codecs(
            f"kv-{self.node_id}-codec", settings.codec_workers, settings.max_codec_bytes
        )
        self.ignored: Counter[str] = Counter()
        bracketed = f"[{advertise}]" if ":" in advertise else advertise
        self.address = f"{bracketed}:{listener.getsockname()[1]}"
        self.links = Links(self, listener, paths, tls)
        self._ends: Counter[str] = Counter()
        self._causes: Counter[str] = Counter()
        self._closed = False
        self.loop.start()

    @property
    def layout(self) -> KVLayout | None:
        """Layout of the registered pool, if there is one."""
        return self.pool.layout if self.pool is not None else None

    @property
    def sections(self) -> dict[str, int]:
        """Versions of what frames for this node may be coded with; nothing decodes to devices."""
        on_device = self.pool is not None and self.pool.staging is not None
        return {} if on_device else dict(self.codecs.versions)

    def meet(self, peer: int, wait_s: float) -> Link:
        """The link to a peer, once it is up; from any thread but the loop's.

        Raises:
            CommTimeoutError: The peer did not come in time.
            CommError: It never will.

        """
        met = threading.Event()

        def begin() -> Link:
            link = self.links.to(peer, time.monotonic() + wait_s)
            link.when_up(lambda _: met.set())
            return link

        self.links.look_up(peer)
        link = self.loop.run(begin)
        if not met.wait(wait_s):
            why = link.dialler.why if link.dialler is not None else "no link"
            raise CommTimeoutError(f"node {peer} never came within {wait_s:g} s ({why})")
        if link.error is not None:
            raise link.error
        return link

    def link_lost(self, link: Link, error: CommError, *, was_up: bool) -> None:
        """Fail what a lost link carried."""
        self.inquiries.link_lost(link, error)
        self.handover.link_lost(link)
        self.sending.link_lost(link, error)
        self.receiving.link_lost(link, error, was_up=was_up)

    # -- messages ---------------------------------------------------------------------------

    def on_message(self, link: Link, message: wire.Session) -> None:
        """Take what a peer says."""
        name = getattr(message, "id", "")
        if len(name) > MAX_ID_CHARACTERS:
            link.lose(DistributedRuntimeError(f"node {link.peer}: an id of {len(name)} characters"))
            return
        match message:
            case wire.Offer():
                self.receiving.on_offer(link, message)
            case wire.Grant():
                self.sending.on_grant(link, message)
            case wire.Invite():
                self.sending.on_invite(link, message)
            case wire.LayerDone():
                self.sending.on_layer_done(link, message)
            case wire.Done():
                self.sending.on_done(link, message.tid)
            case wire.Release():
                self.receiving.arrivals.on_release(link, message.tid)
            case wire.Sealed():
                self.receiving.on_sealed(link, message)
            case wire.Nack():
                self.sending.on_nack(link, message)
            case wire.Fetch():
                self.sending.on_fetch(link, message)
            case wire.Fail():
                error = error_of(message)
                ours = self.sending.on_fail(link, message.tid, error)
                if not ours and not self.receiving.on_fail(link, message.tid, error):
                    self.ignore("fail")
            case wire.KeyFail():
                key = TransferKey(message.id, message.attempt)
                error = error_of(message)
                self.sending.fail_key(link, key, error)
                self.receiving.fail_key(link, key, error)
            case wire.LayoutChanged():
                link.layouts_heard += 1
                self.links.learn(link, message.layout)
                if link.error is None:
                    link.compare(self.layout)
                    self.receiving.layout_changed(link)
            case wire.Lane():
                self.links.data.expect(link, message)
            case wire.MoreLanes():
                self.links.data.on_more(link, message)
            case wire.Ask():
                self.inquiries.on_ask(link, message)
            case wire.Answer():
                self.inquiries.on_answer(link, message)
            case wire.BasisOffer():
                self.handover.on_offer(link, message)
            case wire.BasisWanted():
                self.handover.on_wanted(link, message)
            case wire.BasisPiece():
                self.handover.on_piece(link, message)
            case wire.BasisRefused():
                self.handover.on_refused(link, message)
            case wire.Unknown():
                self.ignore("unknown")
            case wire.Bye():
                why = message.message[:MAX_MESSAGE] or "it closes"
                text = f"node {link.peer} has ended the link: {why}"
                link.lose(PeerLostError(text, rank=link.peer))

    def ignore(self, what: str) -> None:
        """Count a message that came too late, twice, or for an earlier epoch."""
        self.ignored[what] += 1

    def ignored_so_far(self) -> dict[str, int]:
        """What was ignored, by type of message, and late frames."""
        late = self.links.traffic()["late"]
        return {**self.ignored, **({"frame": late} if late else {})}

    def gossip(self, key: TransferKey, error: CommError, told: Iterable[Link]) -> None:
        """Tell every other peer that an attempt has failed."""
        message = key_failure(key, error)
        skip = set(told)
        for link in self.links:
            if link.up and link not in skip:
                link.send(message)

    # -- the pool, ends, counters -----------------------------------------------------------

    def set_pool(self, pool: RegisteredPool | None) -> None:
        """Use another pool, and tell the peers."""
        self.pool = pool
        for link in self.links:
            if link.up:
                self.links.tell_layout(link)
                link.compare(self.layout)
                self.receiving.layout_changed(link)

    def report(self, handle: TransferHandle, error: KVTransferError | None) -> None:
        """Queue the completion of a transfer whose blocks are safe; from any thread."""
        if error is None:
            tokens = handle.num_tokens
            landed = Completion(handle.key, "landed", handle.direction, num_tokens=tokens)
            self.completions.put(landed, handle.witness)
            return
        self.completions.put(
            Completion(
                key=handle.key,
                status="cancelled" if error.cause == CANCELLED else "failed",
                direction=handle.direction,
                cause=error.cause,
                message=str(error),
                invalid_blocks=error.invalid_blocks,
                invalid_by_group=error.invalid_by_group,
            ),
            handle.witness,
        )

    def completed(self, handle: TransferHandle, error: KVTransferError | None) -> None:
        """Count an end."""
        status = "landed"
        if error is not None:
            status = "cancelled" if error.cause == CANCELLED else "failed"
            if status == "failed":
                self._causes[error.cause] += 1
        self._ends[status] += 1
        self.meters.ended(handle, status, "" if error is None else error.cause)

    def begin(self, owner: Receive | Offered, function: Callable[[], T]) -> T:
        """Begin a transfer on the loop; it ends when its caller is stopped before he has it."""
        try:
            return self.loop.run(function)
        except BaseException:
            self.loop.call(lambda: self._abandon(owner))  # behind what may have begun
            raise

    def _abandon(self, owner: Receive | Offered) -> None:
        offers = self.sending.offering.offers.values()
        if owner in self.receiving.arrivals.live or owner in offers:
            self.end(owner, KVTransferError(ABANDONED, cause=CANCELLED))

    def end(self, owner: object, error: CommError) -> None:
        """Give a transfer up."""
        match owner:
            case Push():
                self.sending.fail(owner, error)
            case Receive():
                self.receiving.arrivals.fail(owner, error)
            case Offered():
                self.sending.offering.fail(owner, error)

    def moving(self) -> list[TransferHandle]:
        """Those in flight except offers that nobody fetches just now."""
        return self.sending.moving() + self.receiving.in_flight()

    def in_flight(self) -> list[TransferHandle]:
        """Transfers that have not ended."""
        return self.sending.in_flight() + self.receiving.in_flight()

    def stats(self) -> TransferStats:
        """A snapshot of the counters."""
        total = self.links.traffic()
        return TransferStats(
            transfers=dict(self._ends),
            failures=dict(self._causes),
            bytes_sent=total["sent"],
            bytes_received=total["received"],
            wire_bytes_sent=total["wire_sent"],
            wire_bytes_received=total["wire_received"],
            in_flight=len(self.in_flight()),
            peers=len({link.peer for link in self.links if link.up}),
            rejected_connections=self.links.rejected,
            ignored=self.ignored_so_far(),
        )

    def close(self) -> None:
        """End everything; from another thread. Idempotent."""

        def begin() -> bool:
            if self._closed:
                return False
            self._closed = True
            error = PeerLostError(f"the channel of node {self.node_id} was closed")
            self.links.close_door()
            self.sending.close(error)
            self.receiving.arrivals.close(error)
            self.links.lose_all(error)
            return True

        try:
            if not self.loop.run(begin, 30.0):
                return
        except PeerLostError:
            return
        self.codecs.threads.encoding.close()
        self.codecs.threads.decoding.close()
        self.links.release(10.0)
        self.codecs.close()
        self.loop.stop()
        if self.pool is not None:
            self.pool.close()
        self.completions.close()
        self.discovery.withdraw()
