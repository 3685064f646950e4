"""Seeded schedules over real channels: what may happen next is listed, and chance picks one.

One receiver and one or two senders move two attempts of one key, another key, and an offer. A
schedule ends in calm, when all that was said arrives, and then in silence, when nothing does any
more and only deadlines are left.
"""

import random

from sim_node import CLOCK, BrokenError, Node, Pair, Read, Written, damaged

from sagellm.comm.kv_transfer.state import RULES, Phase
from sagellm.core.protocols import CommError, PeerLostError, TransferKey

KEYS = (TransferKey("a", 0), TransferKey("a", 1), TransferKey("b", 0))
OFFER = TransferKey("o", 0)
SOURCE = {KEYS[0]: [0, 1], KEYS[1]: [2, 3], KEYS[2]: [4, 5], OFFER: [6, 7]}
TARGET = {KEYS[0]: [1, 4], KEYS[1]: [1, 4], KEYS[2]: [8, 2], OFFER: [3, 9]}
RECEIVER = 9
REUSED = 255
NETWORK = {"meets", "learns", "begins"}
"""Words of the moves that a node makes only while its peers are there."""


class World:
    """A seed's schedule."""

    def __init__(self, seed, faults):
        self.rng = random.Random(seed)
        CLOCK.now = 0.0
        self.faults = faults
        self.rough = False  # something happened after which nobody may ever be told
        self.upset = False  # something happened after which not everything has to land
        self.trace = []
        self.ever = set()  # keys that were verified in place
        self.nodes = {}
        sharded = self.rng.random() < 0.6
        self.senders = {0: 0, 1: 1} if sharded else {0: None}
        if self.rng.random() < 0.15:
            self.senders = {0: None, 1: None}  # replicas
        for node_id, rank in (*self.senders.items(), (RECEIVER, None)):
            self.nodes[node_id] = Node(node_id, rank)
        self.offers = len(self.senders) == 1
        self.streams = {(s, k) for s in self.senders for k in KEYS if self.rng.random() < 0.4}
        self.named = {k for k in KEYS if self.rng.random() < 0.6}

    # -- what engines do --------------------------------------------------------------------

    def value(self, sender, key):
        return 1 + sender * 16 + (*KEYS, OFFER).index(key)

    def engine_steps(self, node):
        """What the engine of a node may do next."""
        keys = (*KEYS, OFFER) if self.offers else KEYS
        for key in keys:
            what = "receive" if node.node_id == RECEIVER else "send"
            handle = node.handles.get((what, key))
            if handle is None:
                before = TransferKey(key.id, key.attempt - 1)
                last = node.handles.get((what, before))
                if before not in KEYS or (last is not None and last.done()):
                    yield f"{node.node_id} {what}s {key}", lambda k=key: self.begin(node, k)
            elif (stream := node.handles.get(("stream", key))) is not None:
                yield f"{node.node_id} streams {key}", lambda s=stream, k=key: self.feed(node, s, k)

    def begin(self, node, key):
        ttl = self.rng.choice((5.0, 30.0))
        call = node.channel
        if node.node_id == RECEIVER:
            if key is OFFER:
                handle = call.fetch(key, 0, TARGET[key], deadline_s=ttl)
            else:
                senders = list(self.senders) if key in self.named else None
                handle = call.receive(key, TARGET[key], source_node=senders, deadline_s=ttl)
            node.handles["receive", key] = handle
            return
        node.fill(SOURCE[key], self.value(node.node_id, key))
        if key is OFFER:
            handle = call.offer(key, SOURCE[key], num_tokens=2, ttl_s=ttl)
        elif (node.node_id, key) in self.streams:
            stream = call.begin(key, RECEIVER, SOURCE[key], deadline_s=ttl)
            handle, node.handles["stream", key] = stream.transfer, (stream, [0, 1])
        else:
            handle = call.transfer(SOURCE[key], RECEIVER, key=key, deadline_s=ttl)
        node.handles["send", key] = handle

    @staticmethod
    def feed(node, entry, key):
        stream, layers = entry
        try:
            if layers:
                stream.send_layer(layers.pop(0))
                return
            stream.seal(2)
        except CommError:  # it has failed
            pass
        node.handles["stream", key] = None

    # -- what happens to them ---------------------------------------------------------------

    def connect(self, link):
        node, peer = link.node, self.nodes[link.peer]
        for old in peer.links:
            if not old.outgoing and old.peer == node.node_id:
                old.lose(PeerLostError("connected anew"))
        theirs = peer.links.make(node.node_id, outgoing=False)
        Pair(link, theirs)
        ends = [(node, link, peer), (peer, theirs, node)]
        for _, end, other in ends:
            end.transport, end.up, end.layout = "tcp", True, other.layout
        self.rng.shuffle(ends)
        for owner, end, _ in ends:
            end.compare(owner.layout)
            owner.receiving.layout_changed(end)
            end.settle()

    def crash(self, node):
        """It dies, and is there again without a memory."""
        for link in node.links:
            if link.pair is not None:
                link.pair.cut = True
                link.pair.lanes[link] = ()
                link.pair.control[link].clear()
            link.error = PeerLostError("dead")
        self.nodes[node.node_id] = Node(node.node_id, self.senders.get(node.node_id))

    def steps(self):
        """What can happen without anything going wrong."""
        for node in self.nodes.values():
            yield from self.engine_steps(node)
            yield from self.moves(node)

    def moves(self, node):
        """What threads and the network can do at a node."""
        me = node.node_id
        if node.loop.calls:
            yield f"loop of {me}", lambda: node.loop.calls.popleft()()
        for piece in node.writers:
            yield f"{me} has sent", lambda p=piece: self.sent(node, p)
        for at, piece in node.readers.items():
            yield f"{me} takes a frame", lambda a=at, p=piece: self.took(node, a, p)
        for link in node.links:
            pair = link.pair
            if pair is None:
                yield f"{me} meets {link.peer}", lambda k=link: self.connect(k)
                continue
            if pair.control[link]:
                said = type(pair.control[link][0]).__name__
                yield f"{me} hears {said} of {link.peer}", lambda k=link: self.hear(k)
            if pair.cut:
                yield (
                    f"{me} learns that {link.peer} is gone",
                    lambda k=link: k.lose(PeerLostError("gone", rank=k.peer)),
                )
            for lane, frames in enumerate(pair.lanes[link]):
                if frames and (link, lane) not in node.readers:
                    yield (
                        f"a frame of {link.peer} is at {me}",
                        lambda k=link, n=lane: self.arrive(node, k, n),
                    )
            if not link.broken and sum(p.link is link for p in node.writers) < 2:
                for flow in link.writer.flows:
                    if flow.waiting:
                        yield f"{me} begins a frame", lambda k=link, f=flow: self.write(node, k, f)

    def hear(self, link):
        link._on_message(link, link.pair.control[link].popleft())

    @staticmethod
    def write(node, link, flow):
        piece = Written(link, flow)
        if piece.chunk is not None:
            node.writers.append(piece)

    def sent(self, node, piece):
        node.writers.remove(piece)
        piece.finish(self.rng.randrange(2))

    @staticmethod
    def arrive(node, link, lane):
        node.readers[link, lane] = Read(link, link.pair.lanes[link][lane].popleft())

    @staticmethod
    def took(node, at, piece):
        if piece.go_on():
            del node.readers[at]

    def fault_steps(self):
        """What can go wrong: (name, what to do, whether nobody may be told)."""
        for node in self.nodes.values():
            for (what, key), handle in node.handles.items():
                if what != "stream" and not handle.done():
                    yield f"{node.node_id} cancels {what} {key}", handle.cancel, False
            if node.loop.next_at() is not None:
                yield f"time passes at {node.node_id}", node.loop.ring, False
            for link in node.links:
                if link.pair is None:
                    continue
                yield f"{node.node_id} loses {link.peer}", lambda k=link: self.cut(k.pair), True
                if said := link.pair.control[link]:
                    name = type(said[0]).__name__
                    yield f"{name} is lost", said.popleft, True
                    yield f"{name} comes twice", lambda q=said: q.appendleft(q[0]), True
                    if len(said) > 1:
                        yield f"{name} comes later", lambda q=said: self.swap(q), True
                for frames in link.pair.lanes[link]:
                    if frames:
                        yield "a frame is damaged", lambda q=frames: self.damage(q), False
                        yield "a frame comes twice", lambda q=frames: q.append(q[0]), True
        for node in self.nodes.values():
            yield f"{node.node_id} crashes", lambda n=node: self.crash(n), True

    @staticmethod
    def cut(pair):
        pair.cut = True

    @staticmethod
    def swap(messages):
        first, second = messages.popleft(), messages.popleft()
        messages.extendleft((first, second))

    @staticmethod
    def damage(frames):
        frames[0] = damaged(frames[0])

    # -- a schedule -------------------------------------------------------------------------

    def run(self, steps=400):
        """Everything in an order that the seed decides."""
        for _ in range(steps):
            if self.faults and self.rng.random() < 0.04:
                choices = list(self.fault_steps())
                kinds = sorted({c[0].split()[1] for c in choices})
                kind = self.rng.choice(kinds)  # else what there is most of would always be it
                name, do, rough = self.rng.choice([c for c in choices if c[0].split()[1] == kind])
                self.faults -= 1
                self.rough |= rough
                self.upset = True
                self.do(f"FAULT {name}", do)
                continue
            choices = list(self.steps())
            if not choices:
                break
            self.do(*self.rng.choice(choices))
        self.calm()
        self.silence()

    def do(self, name, step):
        self.trace.append(name)
        try:
            step()
            self.check()
        except BrokenError as e:
            raise BrokenError(f"{e}: {'; '.join(self.trace)}") from None

    def check(self):
        """What holds after every step."""
        for node in self.nodes.values():
            for piece in (*node.writers, *node.readers.values()):
                if getattr(piece, "claimed", True):
                    self.check_piece(node, piece)
            for (what, key), handle in node.handles.items():
                if what == "stream":
                    continue
                self.check_end(node, what, key, handle)

    @staticmethod
    def check_piece(node, piece):
        owners = [piece.flow.handle]
        for push in node.sending.offering.serving:
            if push.flow is piece.flow:
                owners.append(push.offered.handle)
        if any(RULES[h.phase].safe for h in owners):
            raise BrokenError("a thread is at blocks that were given back")

    def check_end(self, node, what, key, handle):
        landed = handle.phase in (Phase.LANDED, Phase.SETTLING, Phase.RELEASED)
        if what == "receive":
            if landed and (node, key) not in self.ever:
                self.check_landed(node, key)
                self.ever |= {(node, key), key}
        elif landed and key not in self.ever:
            raise BrokenError("the sender believes in a landing that nobody has verified")
        elif handle.done() and (node, key) not in self.ever:
            self.ever.add((node, key))
            node.fill(SOURCE[key], REUSED)  # the engine computes something else there

    def check_landed(self, node, key):
        for head, found in enumerate(node.seen(TARGET[key])):
            holders = [s for s, r in self.senders.items() if r in (None, head)]
            if len(found) != 1 or not found <= {self.value(s, key) for s in holders}:
                raise BrokenError(f"other bytes landed than were sent: {found} in head {head}")

    def calm(self):
        """Nothing goes wrong any more, and no time passes."""
        for _ in range(3000):
            choices = list(self.steps())
            if not choices:
                break
            self.do(*self.rng.choice(choices))
        else:
            raise BrokenError(f"it does not come to rest: {self.trace[-40:]}")
        rough = self.rough or any(n.links.lost for n in self.nodes.values())
        for key in KEYS:
            known = [
                h
                for n in self.nodes.values()
                for (what, k), h in n.handles.items()
                if k == key and what != "stream"
            ]
            gave_up = any(h.phase in (Phase.FAILED, Phase.CANCELLED) for h in known)
            if gave_up and not rough and not all(h.done() for h in known):
                raise BrokenError(f"the others were never told of {key}: {self.trace}")
        every = [h for n in self.nodes.values() for (w, _), h in n.handles.items() if w != "stream"]
        if not self.upset and any(h.phase is not Phase.RELEASED for h in every):
            raise BrokenError(f"something did not land: {every}: {self.trace}")

    def silence(self):
        """With peers that say nothing any more limits alone end everything; books are empty."""
        for node in self.nodes.values():
            for link in node.links:
                if link.pair is not None:
                    link.pair.cut = True
                    link.pair.control[link].clear()
                    link.pair.lanes[link] = ()
            for _ in range(2000):
                inside = [m for m in self.moves(node) if not NETWORK & set(m[0].split())]
                if inside:
                    self.do(*inside[0])
                elif node.loop.next_at() is not None:
                    self.do("time passes", node.loop.ring)
                else:
                    break
            self.check_books(node)

    def check_books(self, node):
        handles = {n: h for n, h in node.handles.items() if n[0] != "stream"}
        if not all(h.done() for h in handles.values()):
            raise BrokenError(f"nothing ends {handles}: {self.trace}")
        if node.pool.leases or node.in_flight() or node.receiving.arrivals.unconfirmed:
            held = node.pool.lease_holders()
            raise BrokenError(f"held for ever: {held}, {node.in_flight()}: {self.trace}")
        if any(link.inflows for link in node.links):
            raise BrokenError(f"a peer may write for ever: {self.trace}")
        told = [(c.direction, c.key) for c in node.channel.poll()]
        if sorted(told) != sorted((h.direction, h.key) for h in handles.values()):
            raise BrokenError(f"completions {told} of {list(handles)}: {self.trace}")


def explore(seeds, faults):
    """Runs these seeds; the steps that were made, or BrokenError with the seed and the way."""
    steps = 0
    for seed in seeds:
        world = World(seed, faults)
        try:
            world.run()
        except BrokenError as e:
            raise BrokenError(f"seed {seed}: {e}") from None
        except Exception as e:
            raise RuntimeError(f"seed {seed}: {'; '.join(world.trace)}") from e
        steps += len(world.trace)
    return steps
