"""A channel without sockets, threads and clocks: the real books, and links that a test moves.

`KVTransferChannel`, `Engine`, `Sending`, `Receiving`, `Offering`, `Link`, the flows, the pool and
the table are those of the package. The event loop, the lanes' threads and the network are queues
here, whose next step a scheduler chooses.
"""

import heapq
import itertools
from collections import Counter, deque
from types import SimpleNamespace

import torch

from sagellm.comm.kv_transfer import (
    KVTransferChannel,
    KVTransferSettings,
    _engine,
    _limits,
    transfer,
)
from sagellm.comm.kv_transfer._link import Link
from sagellm.comm.kv_transfer._loop import Timer
from sagellm.comm.kv_transfer.frames import REF, Header, block_sums
from sagellm.comm.kv_transfer.pool import RegisteredPool
from sagellm.core.protocols import CacheGroup, IntegrityError, KVLayout, PeerLostError, Shard

HEADS, LAYERS, BLOCKS, DIM = 2, 2, 10, 4
CLOCK = SimpleNamespace(now=0.0, monotonic=lambda: CLOCK.now)
"""What transfers take for the module `time`; it stands still but for timers that go off."""
SETTINGS = KVTransferSettings(quiesce_s=0.5, max_in_flight=16)


def install(monkeypatch):
    """Have engines made of these parts, and transfers look at this clock."""
    monkeypatch.setattr(_engine, "EventLoop", Loop)
    monkeypatch.setattr(_engine, "Links", SimLinks)
    nowhere = SimpleNamespace(getsockname=lambda: ("", 0))
    monkeypatch.setattr(_engine, "listen", lambda host, port: nowhere)
    for module in (transfer, _limits):
        monkeypatch.setattr(module, "time", CLOCK, raising=False)


class BrokenError(Exception):
    """An invariant does not hold."""


def layout(rank=None):
    """All heads, or those of one of two ranks."""
    shard = None if rank is None else Shard("head", rank, HEADS, 1)
    heads = HEADS if rank is None else 1
    names = tuple(f"layer{i}" for i in range(LAYERS))
    axes = ("block", "head", "token", "dim")
    group = CacheGroup("kv", "kv", names, axes, (heads, 1, DIM), "uint8", 1, shard=shard)
    return KVLayout((group,), "sim")


class Loop:
    """An event loop whose callbacks run when the scheduler says so."""

    def __init__(self, name):
        self.calls, self.timers = deque(), []
        self._ids = itertools.count()

    def start(self):
        pass

    def call(self, callback):
        self.calls.append(callback)
        return True

    post = call

    def rouse(self):
        pass

    def run(self, function, timeout_s=10.0):
        while self.calls:
            self.calls.popleft()()
        return function()

    def call_later(self, delay_s, callback):
        timer = Timer(callback)
        heapq.heappush(self.timers, (CLOCK.now + delay_s, next(self._ids), timer))
        return timer

    def next_at(self):
        """When the next timer goes off; None without one."""
        while self.timers and self.timers[0][2].callback is None:
            heapq.heappop(self.timers)
        return self.timers[0][0] if self.timers else None

    def ring(self):
        """Set off the next timer."""
        at, _, timer = heapq.heappop(self.timers)
        CLOCK.now = max(CLOCK.now, at)
        timer.callback()


class Writer:
    """What is to be sent over a link; `Piece`s send it."""

    key, checksum = b"", True
    tuner = SimpleNamespace(lanes=2)

    def __init__(self):
        self.flows, self.stopped = [], False

    def add(self, flow, *, here=False):
        if flow not in self.flows:
            self.flows.append(flow)

    def stop(self):
        self.stopped = True


class SimLink(Link):
    """A link whose messages and frames lie in queues of its `pair`."""

    pair = None
    broken = False  # its data connections

    def __init__(self, node, peer, *, outgoing):
        self.node = node
        super().__init__(
            node.loop,
            peer,
            outgoing=outgoing,
            writer=Writer(),
            make_reader=lambda inflows: SimpleNamespace(key=b"", late=0),
            max_backlog_bytes=1 << 20,
            max_invitations=16,
            invited=node.invited,
            control=node.control,
            on_message=node.on_message,
            on_lost=node.links.on_lost,
        )

    def send(self, message):
        if self.pair is not None and self.error is None and not self.pair.cut:
            self.pair.control[self.pair.other(self)].append(message)

    def lose(self, error):
        if self.pair is not None:
            self.pair.cut = True
        super().lose(error)

    def abort_data(self):
        self.broken = True


class Pair:
    """Both ends of a link and what is on the way: control in order, frames in two lanes."""

    def __init__(self, opener, acceptor):
        self.ends, self.cut = (opener, acceptor), False
        self.control = {end: deque() for end in self.ends}
        self.lanes = {end: (deque(), deque()) for end in self.ends}
        opener.pair = acceptor.pair = self

    def other(self, end):
        return self.ends[self.ends[0] is end]


class SimLinks:
    """The links of a node."""

    rejected = 0
    data = SimpleNamespace(both_ways=lambda link: None)

    def __init__(self, node, listener, paths, tls):
        self.node, self.all, self.outgoing = node, [], {}
        self.lost = 0

    def __iter__(self):
        return iter(list(self.all))

    def traffic(self):
        return Counter(late=0)

    def look_up(self, *peers):
        """Every node is known."""

    def make(self, peer, *, outgoing):
        link = SimLink(self.node, peer, outgoing=outgoing)
        self.all.append(link)
        return link

    def to(self, peer, until):
        if peer not in self.outgoing:
            self.outgoing[peer] = self.make(peer, outgoing=True)
        return self.outgoing[peer]

    def ready(self, peer):
        link = self.outgoing.get(peer)
        return link if link is not None and link.up else None

    def why_absent(self, peer):
        return "not dialled"

    def on_lost(self, link, error):
        self.lost += 1
        self.all.remove(link)
        if self.outgoing.get(link.peer) is link:
            del self.outgoing[link.peer]
        self.node.link_lost(link, error, was_up=link.transport != "")


class Node(_engine.Engine):
    """The engine of a channel, over these links."""

    def __init__(self, node_id, rank=None):
        super().__init__(
            SimpleNamespace(node_id=node_id), SETTINGS, None, host="", port=0, advertise="sim"
        )
        kind = layout(rank)
        heads = kind.groups[0].block_shape[0]
        memory = {n: torch.zeros(BLOCKS, heads, 1, DIM, dtype=torch.uint8) for n in kind.layers}
        self.pool = RegisteredPool(kind, memory)
        self.heads = range(HEADS) if rank is None else (rank,)
        self.channel = KVTransferChannel.__new__(KVTransferChannel)
        self.channel._engine = self
        self.handles = {}  # (what, key): those that the engine of this node was given
        self.readers = {}  # (link, lane): the piece of a thread
        self.writers = []

    def fill(self, blocks, value):
        """Compute other bytes into blocks."""
        for tensor in self.pool.tensors.values():
            tensor[blocks] = value

    def seen(self, blocks):
        """The distinct bytes of each head in these blocks."""
        return [
            {v for t in self.pool.tensors.values() for v in t[blocks, h].flatten().tolist()}
            for h in range(len(self.heads))
        ]


class Written:
    """A thread that sends one frame: it has claimed it, and reads the blocks when it is done."""

    def __init__(self, link, flow):
        self.link, self.flow, self.chunk = link, flow, flow.claim(1, 1)

    def finish(self, lane):
        flow, link = self.flow, self.link
        if link.error is None and not link.broken:
            if flow.extent is None:
                raise BrokenError("a thread is at blocks that were given back")
            layer, first, count = self.chunk
            extent = flow.extent
            payload = b"".join(extent.views(layer, first, count))
            sums = block_sums(extent.unit_views(layer, first, count), layer, first)
            head = Header(flow.tid, layer, first, count, len(payload), flow.flags)
            if not link.pair.cut:
                link.pair.lanes[link.pair.other(link)][lane].append((head, payload, sums))
            _count(flow.handle, len(payload), count)
        flow.leave()
        if link.broken and link.error is None:
            link.lose(PeerLostError("the data connection was broken"))


class Read:
    """A thread that takes one frame: it looks the transfer up, claims, copies and verifies."""

    def __init__(self, link, frame):
        self.link, self.frame = link, frame
        self.flow = link.inflows.get(frame[0].tid)
        self.claimed = False

    def go_on(self):
        """One step; True when it is done."""
        (head, payload, sums), flow, link = self.frame, self.flow, self.link
        if flow is None or link.error is not None:
            if self.claimed:
                flow.leave()
            return True
        if not self.claimed:
            try:
                self.claimed = flow.claim(head)
            except IntegrityError as e:
                link.lose(e)
                return True
            return not self.claimed
        views = flow.extent.views(head.layer, head.first, head.count)
        at = 0
        for view in views:
            view[:] = payload[at : at + len(view)]
            at += len(view)
        units = flow.extent.unit_views(head.layer, head.first, head.count)
        found = block_sums(units, head.layer, head.first)
        bad = [i for i, (a, b) in enumerate(zip(found, sums, strict=True)) if a != b]
        _count(flow.handle, len(payload), head.count - len(bad))
        fresh, again = flow.landed(head, bad)
        flow.leave()
        link.node.receiving.arrivals.on_frame(link, flow, head, fresh, again)
        return True


def _count(handle, nbytes, blocks):
    handle.moved(nbytes, blocks, wire_bytes=nbytes, runs=1, syscalls=1, verify_s=0.0, codec_s=0.0)


def damaged(frame):
    """A frame whose bytes have changed on the way."""
    head, payload, sums = frame
    assert not head.flags & REF
    return head, bytes([payload[0] ^ 1]) + payload[1:], sums
