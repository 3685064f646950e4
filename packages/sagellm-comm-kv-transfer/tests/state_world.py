"""Every path of the table, explored: two sides, two attempts of one key, a network that fails.

The sender S pushes and the receiver R receives attempts 0 and 1 of a key into the same block.
Control messages go through one queue each way, frames through a lane of their own. What is
decided is decided by the table that the channel uses.
"""

import gc
from collections import deque

from sagellm.comm.kv_transfer.state import RULES, TABLE, Event, Limit, Phase, Role

S, R = Role.SEND, Role.RECEIVE


class BrokenError(Exception):
    """An invariant does not hold."""


class Part:
    """One attempt on one side."""

    __slots__ = ("begun", "busy", "content", "lease", "phase", "sealed", "tid")

    def __init__(self):
        self.phase = None  # not begun
        self.tid = 0  # its epoch; 0 without one
        self.begun = False  # S: the frame was written; R: the frame has come
        self.busy = False  # a thread is at the block
        self.lease = False
        self.content = None  # R: what is in the block, once it is verified

    def key(self):
        return (self.phase, self.tid, self.begun, self.busy, self.lease, self.content)

    def copy(self):
        new = Part.__new__(Part)
        new.phase, new.tid, new.begun = self.phase, self.tid, self.begun
        new.busy, new.lease, new.content = self.busy, self.lease, self.content
        return new


class World:
    """Both sides and what is on the way."""

    def __init__(self, rules=RULES, table=TABLE, weak=""):
        self.rules, self.table, self.weak = rules, table, weak
        self.parts = {S: [Part(), Part()], R: [Part(), Part()]}
        self.alive = {S: True, R: True}
        self.failed = {S: frozenset(), R: frozenset()}  # attempts remembered as failed
        self.invites = ()  # at S: (tid, attempt)
        self.parked = ()  # at R: (tid, attempt)
        self.landed = frozenset()  # remembered at R
        self.ever = frozenset()  # verified at R, whatever happened to it since
        self.up = True
        self.unaware = {S: False, R: False}  # of a cut
        self.queues = {"sr": (), "rs": (), "lane": ()}
        self.next_tid = 1
        self.faults = 0
        self.rough = False  # a fault after which nobody may ever be told
        self.end_alone_of = set()  # shared by all copies: what was found to end

    def key(self):
        return (
            *(p.key() for side in (S, R) for p in self.parts[side]),
            self.alive[S], self.alive[R], self.failed[S], self.failed[R], self.invites, self.parked,
            self.landed, self.ever, self.up, self.unaware[S], self.unaware[R],
            *self.queues.values(), self.next_tid, self.faults,
        )  # fmt: skip

    def copy(self):
        new = World.__new__(World)
        new.__dict__.update(self.__dict__)
        new.parts = {side: [p.copy() for p in parts] for side, parts in self.parts.items()}
        new.alive, new.failed = dict(self.alive), dict(self.failed)
        new.unaware, new.queues = dict(self.unaware), dict(self.queues)
        return new

    # -- what the table decides --------------------------------------------------------------

    def take(self, side, attempt, event):
        p = self.parts[side][attempt]
        step = self.table[side].get(p.phase, {}).get(event)
        if step is None:
            return None
        if event is Event.COMPLETE and p.content != attempt:
            raise BrokenError("a block landed with other bytes than were sent")
        counted = p.phase is Phase.SETTLING or event is Event.COMPLETE
        counted |= self.rules[p.phase].landed
        p.phase = step.to
        if self.rules[p.phase].landed and attempt not in self.ever:
            raise BrokenError("what was not verified counts as landed")
        if counted and self.rules[p.phase].safe and not self.rules[p.phase].landed:
            raise BrokenError("what has landed does not count")
        if self.rules[p.phase].safe:
            p.lease = False
            if p.busy:
                raise BrokenError("a thread is at a block that was given back")
        if side is S and p.phase in (Phase.SETTLING, Phase.RELEASED) and attempt not in self.ever:
            raise BrokenError("the sender believes in a landing that the receiver has not verified")
        return step

    def moves(self, side, attempt):
        p = self.parts[side][attempt]
        return p.phase is not None and self.rules[p.phase].moves

    def awaits(self, side, attempt, event):
        return event in self.table[side].get(self.parts[side][attempt].phase, {})

    def over(self, side, attempt):
        p = self.parts[side][attempt]
        return p.phase is not None and self.rules[p.phase].safe

    def send(self, way, *message):
        if self.up:
            self.queues[way] += (message,)

    # -- what both sides do -------------------------------------------------------------------

    def begin(self, side, attempt):
        p = self.parts[side][attempt]
        p.phase, p.lease = Phase.OFFERED, True
        if attempt in self.failed[side]:
            self.fault(side, attempt, told=True)
        elif side is S:
            self.meet_s(attempt)
        else:
            for tid, a in self.parked:
                if a == attempt:
                    self.parked = tuple(x for x in self.parked if x != (tid, a))
                    self.join(tid, attempt)
                    return
            self.invite(attempt)

    def fault(self, side, attempt, *, told=False, event=Event.FAULT):
        p = self.parts[side][attempt]
        step = self.take(side, attempt, event)
        if step is None:
            return
        self.failed[side] |= {attempt}
        way = "sr" if side is S else "rs"
        if not told and not p.tid:
            self.send(way, "key_fail", attempt)
        elif not told and step.tells:
            self.send(way, step.tells, p.tid)
        p.tid = 0

    def idle(self, side, attempt):
        self.take(side, attempt, Event.IDLE)

    def expire(self, side, attempt):
        event = self.rules[self.parts[side][attempt].phase].at_limit
        if event is Event.FAULT:
            self.fault(side, attempt)
        else:
            self.take(side, attempt, event)
            self.parts[side][attempt].tid = 0

    # -- the sender ---------------------------------------------------------------------------

    def meet_s(self, attempt):
        p = self.parts[S][attempt]
        if not self.up or self.unaware[S] or not self.alive[R]:
            return
        invited = [tid for tid, a in self.invites if a == attempt]
        if invited:
            self.invites = tuple(x for x in self.invites if x[1] != attempt)
            p.tid = invited[-1]
            self.take(S, attempt, Event.ACCEPT)
        else:
            p.tid, self.next_tid = self.next_tid, self.next_tid + 1
            self.send("sr", "offer", p.tid, attempt)

    def written(self, attempt, tid):
        p = self.parts[S][attempt]
        p.busy = False
        if self.up:
            self.queues["lane"] += ((tid, attempt, True),)
        self.take(S, attempt, Event.FRAME)

    def at_s(self, kind, name, attempt=0):
        mine = [a for a, p in enumerate(self.parts[S]) if name and p.tid == name]
        if kind == "key_fail":
            self.failed[S] |= {name}
            self.fault(S, name, told=True)
        elif kind == "invite":
            if not self.parts[S][attempt].tid and attempt not in self.failed[S]:
                self.invites = (*(x for x in self.invites if x[1] != attempt), (name, attempt))
        elif kind == "grant" and mine:
            if self.awaits(S, mine[0], Event.ACCEPT):
                self.take(S, mine[0], Event.ACCEPT)
        elif kind == "done" and mine:
            step = self.take(S, mine[0], Event.DONE)
            if step is not None:
                self.parts[S][mine[0]].tid = 0
                if step.tells:
                    self.send("sr", step.tells, name)
        elif kind == "fail":
            for tid, a in self.invites:
                if tid == name:
                    self.failed[S] |= {a}
            self.invites = tuple(x for x in self.invites if x[0] != name)
            if mine:
                self.fault(S, mine[0], told=True)

    # -- the receiver -------------------------------------------------------------------------

    def invite(self, attempt):
        p = self.parts[R][attempt]
        if self.up and not self.unaware[R] and self.alive[S]:
            p.tid, self.next_tid = self.next_tid, self.next_tid + 1
            self.send("rs", "invite", p.tid, attempt)

    def join(self, tid, attempt):
        p = self.parts[R][attempt]
        if p.tid and (p.begun or p.busy or p.phase is not Phase.OFFERED):
            self.send("rs", "fail", tid)
            return
        if self.weak == "offer ignored":
            return
        step = self.take(R, attempt, Event.ACCEPT)
        p.tid = tid  # an invitation is withdrawn by this
        self.send("rs", step.tells, tid)

    def at_r(self, kind, name, attempt=0):
        mine = [a for a, p in enumerate(self.parts[R]) if name and p.tid == name]
        if kind == "key_fail":
            self.parked = tuple(x for x in self.parked if x[1] != name)
            if name not in self.landed:
                self.failed[R] |= {name}
            self.fault(R, name, told=True)
        elif kind == "offer":
            if mine or (name, attempt) in self.parked:
                self.cut()
            elif self.moves(R, attempt):
                self.join(name, attempt)
            elif attempt in self.landed:
                self.send("rs", "done", name)
            elif attempt in self.failed[R]:
                self.send("rs", "fail", name)
            else:
                self.parked += ((name, attempt),)
        elif kind == "release" and mine:
            if self.take(R, mine[0], Event.RELEASE):
                self.parts[R][mine[0]].tid = 0
        elif kind == "fail":
            for tid, a in self.parked:
                if tid == name:
                    self.failed[R] |= {a}
            self.parked = tuple(x for x in self.parked if x[0] != name)
            if mine:
                self.fault(R, mine[0], told=True)

    def frame_comes(self):
        tid, attempt, sound = self.queues["lane"][0]
        self.queues["lane"] = self.queues["lane"][1:]
        for a, p in enumerate(self.parts[R]):
            if (p.tid == tid or self.weak == "epoch unchecked") and self.moves(R, a) and p.tid:
                if p.begun:
                    self.cut()  # it has landed before: the peer breaks the rules
                    return
                p.busy, p.begun = True, True
                p.content = attempt if sound else "damaged"
                return

    def verified(self, attempt):
        p = self.parts[R][attempt]
        p.busy = False
        if p.content == "damaged" and self.weak != "unverified":
            self.fault(R, attempt)
            return
        self.take(R, attempt, Event.FRAME)

    def complete(self, attempt):
        p = self.parts[R][attempt]
        if p.content == attempt:
            self.ever |= {attempt}
        step = self.take(R, attempt, Event.COMPLETE)
        if step is not None:
            self.landed |= {attempt}
            self.send("rs", step.tells, p.tid)

    # -- the network --------------------------------------------------------------------------

    def cut(self):
        """What is on the way may still arrive until each side knows."""
        if self.up:
            self.up = False
            self.rough = True
            self.unaware = {side: self.alive[side] for side in (S, R)}

    def learn(self, side):
        """A side learns that its link is gone; its threads leave when they like."""
        self.unaware[side] = False
        for way in ("rs",) if side is S else ("sr", "lane"):
            self.queues[way] = ()
        if side is S:
            self.invites = ()
        else:
            self.parked = ()
        for attempt, p in enumerate(self.parts[side]):
            if p.phase is not None and self.rules[p.phase].at_limit is Event.RELEASE:
                self.take(R, attempt, Event.RELEASE)
                p.tid = 0
            elif p.tid or side is R:
                self.fault(side, attempt, told=True)
                p.tid = 0

    def connect(self):
        if self.unaware[R]:
            self.learn(R)
        self.up = True
        self.queues = dict.fromkeys(self.queues, ())
        for attempt in (0, 1):
            if self.parts[R][attempt].phase is Phase.OFFERED:
                self.invite(attempt)
            if self.parts[S][attempt].phase is Phase.OFFERED:
                self.meet_s(attempt)

    def crash(self, side):
        self.cut()
        self.alive[side] = False
        self.unaware[side] = False
        self.parts[side] = [Part(), Part()]
        self.failed[side] = frozenset()
        if side is S:
            self.invites = ()
            self.queues["rs"] = ()
        else:
            self.parked, self.landed = (), frozenset()
            self.queues["sr"] = self.queues["lane"] = ()

    # -- all that can happen next -------------------------------------------------------------

    def steps(self, faults):
        """(name, whether it is a fault, what to do with a copy)."""
        for side in (S, R):
            if not self.alive[side]:
                continue
            for a, p in enumerate(self.parts[side]):
                if p.phase is None:
                    if a == 0 or self.over(side, 0):
                        yield f"{side} begins {a}", False, lambda w, s=side, a=a: w.begin(s, a)
                    continue
                if Event.IDLE in self.table[side].get(p.phase, ()) and not p.busy:
                    yield f"{side} idle {a}", False, lambda w, s=side, a=a: w.idle(s, a)
                if faults and self.moves(side, a):
                    yield (
                        f"{side} cancels {a}",
                        True,
                        lambda w, s=side, a=a: w.fault(s, a, event=Event.CANCEL),
                    )
                # other deadlines end as cancels do
                if faults and self.rules[p.phase].at_limit is Event.RELEASE:
                    yield f"{side} expires {a}", True, lambda w, s=side, a=a: w.expire(s, a)
            if self.unaware[side]:
                yield f"{side} learns", False, lambda w, s=side: w.learn(s)
            if faults:
                yield f"{side} crashes", True, lambda w, s=side: w.crash(s)
        for a, p in enumerate(self.parts[S]):
            if p.busy:
                yield f"S has written {a}", False, lambda w, a=a, t=p.tid: w.written(a, t)
            elif self.moves(S, a) and p.phase is not Phase.OFFERED and not p.begun:
                yield f"S writes {a}", False, lambda w, a=a: vars_of(w, S, a, busy=True, begun=True)
        for a, p in enumerate(self.parts[R]):
            if p.busy:
                yield f"R verifies {a}", False, lambda w, a=a: w.verified(a)
            elif Event.COMPLETE in self.table[R].get(p.phase, ()) and p.begun:
                yield f"R completes {a}", False, lambda w, a=a: w.complete(a)
        for way, at in (("sr", R), ("rs", S)):
            queue = self.queues[way]
            if queue and self.alive[at]:
                yield f"{at} gets {queue[0]}", False, lambda w, y=way: w.deliver(y)
                if not faults:
                    continue
                yield f"{queue[0]} twice", True, lambda w, y=way: w.put(y, (0, 0))
                yield f"{queue[0]} lost", True, lambda w, y=way: w.put(y, ())
                if len(queue) > 1:
                    yield f"{queue[:2]} swapped", True, lambda w, y=way: w.put(y, (1, 0), 2)
        if self.queues["lane"] and self.alive[R]:
            yield "a frame comes", False, lambda w: w.frame_comes()
            if faults:
                yield "a frame twice", True, lambda w: w.put("lane", (0, 0))
                yield "a frame damaged", True, lambda w: w.damage()
        if self.up and faults:
            yield "cut", True, lambda w: w.cut()
        elif not self.up and self.alive[S] and self.alive[R] and not self.unaware[S]:
            yield "connect", False, lambda w: w.connect()
        for side in (S, R):
            if not self.alive[side]:
                yield f"{side} restarts", False, lambda w, s=side: w.alive.update({s: True})

    def deliver(self, way):
        message, self.queues[way] = self.queues[way][0], self.queues[way][1:]
        (self.at_r if way == "sr" else self.at_s)(*message)

    def put(self, way, order, count=1):
        """Deliver badly: the first messages again in this order."""
        self.rough = True
        head, rest = self.queues[way][:count], self.queues[way][count:]
        self.queues[way] = tuple(head[i] for i in order) + rest

    def damage(self):
        (tid, attempt, _), *rest = self.queues["lane"]
        self.queues["lane"] = ((tid, attempt, False), *rest)

    # -- what has to hold ---------------------------------------------------------------------

    def check(self):
        for side in (S, R):
            for p in self.parts[side]:
                if p.busy and not p.lease:
                    raise BrokenError("a thread is at a block that was given back")
        for side in (S, R):
            parts = (side, *(p.key() for p in self.parts[side]))
            if parts not in self.end_alone_of:
                self.copy().end_alone(side)
                self.end_alone_of.add(parts)
        quiet = not any(self.queues.values()) and self.up and not self.rough
        if quiet and not any(p.busy for side in (S, R) for p in self.parts[side]):
            for a in (0, 1):
                for x, y in ((S, R), (R, S)):
                    failed = self.parts[x][a].phase in (Phase.FAILED, Phase.CANCELLED)
                    if failed and self.moves(y, a) and not self.pending():
                        raise BrokenError("the other side was never told")

    def pending(self):
        return any("completes" in name or "writes" in name for name, _, _ in self.steps(False))

    def end_alone(self, side):
        """With a peer that does nothing any more, limits alone must end everything."""
        for _ in range(8):
            for a, p in enumerate(self.parts[side]):
                if p.phase is None:
                    continue
                rule = self.rules[p.phase]
                if rule.limit is Limit.DEADLINE:
                    self.expire(side, a)
                elif rule.limit is Limit.QUIESCE:
                    p.busy = False  # the connection is broken, so that threads leave
                    self.idle(side, a)
        for p in self.parts[side]:
            if p.phase is None:
                continue
            if self.table[side].get(p.phase) or self.rules[p.phase].limit is not Limit.NONE:
                raise BrokenError(f"nothing ends {p.phase}")
            if p.lease:
                raise BrokenError("a lease is held for ever")


def vars_of(world, side, attempt, **values):
    for name, value in values.items():
        setattr(world.parts[side][attempt], name, value)


def explore(world, faults, limit=1_000_000):
    """Visits every state; (states, ends), or raises BrokenError with the way that leads there."""
    gc.disable()  # it would look through all states again and again, and they hold no cycles
    try:
        return _explore(world, faults, limit)
    finally:
        gc.enable()


def _explore(world, faults, limit):
    came = {world.key(): (None, "")}
    todo, ends = deque([world]), []
    while todo:
        at = todo.popleft()
        key, last = at.key(), True
        for name, fault, do in at.steps(at.faults < faults):
            new = at.copy()
            new.faults += fault
            try:
                do(new)
                if (new_key := new.key()) not in came:
                    new.check()
            except BrokenError as e:
                way = [name]
                while key is not None:
                    key, before = came[key]
                    way.append(before)
                raise BrokenError(f"{e}: {', '.join(filter(None, reversed(way)))}") from None
            last = False
            if new_key not in came:
                came[new_key] = (key, name)
                assert len(came) < limit, "more states than were reckoned with"
                todo.append(new)
        if last:
            ends.append(at)
    return len(came), ends
