"""Receives that run: who writes into them, how long they may, and how they end.

What comes is noted on the threads that read it, and the last of them lands the receive;
everything else here runs on the event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from sagellm.core.protocols import CommError, CommTimeoutError, IntegrityError, TransferKey

from . import wire
from ._flows import Inflow
from ._granting import Granter
from ._limits import Watch
from ._link import Link
from ._receive import End, Receive, Source
from ._records import Memory, bare, ending, failure
from ._visit import SMALL_BYTES
from .frames import SEALED, Header
from .state import RULES, Event

if TYPE_CHECKING:
    from ._engine import Engine

__all__ = ["Arrivals"]


class Arrivals:
    """The receives of a channel from when they begin until they have ended.

    Args:
        engine: The channel's engine.
        granter: Whose memory they use.
        dismiss: Gives the senders that wait to join a receive, which then no longer do.
        room: Told when there is memory again.

    """

    def __init__(
        self,
        engine: Engine,
        granter: Granter,
        dismiss: Callable[[Receive], Iterable[tuple[Link, int]]],
        room: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._granter = granter
        self._dismiss = dismiss
        self._room = room
        self.active: dict[TransferKey, Receive] = {}
        self.unnamed: list[Receive] = []
        self.live: set[Receive] = set()
        self.unconfirmed: set[Receive] = set()
        self.by_tid: dict[tuple[Link, int], tuple[Receive, Source]] = {}
        self.ended: Memory[TransferKey, End] = Memory(engine.settings.max_remembered)

    def watch(self, r: Receive) -> None:
        """Keep the limits of a receive that begins."""
        self.live.add(r)
        r.watch = Watch(
            self._engine.loop,
            r.handle,
            self._engine.settings,
            lambda: sum(s.link.moved_bytes() for s in r.sources),
            lambda: self._expire(r),
            lambda: self._break_off(r),
        )
        r.watch.follow()

    def _expire(self, r: Receive) -> None:
        if RULES[r.handle.phase].at_limit is Event.RELEASE:  # its sender's word is of no need
            self._release(r)
            return
        self.fail(
            r,
            CommTimeoutError(
                f"not landed within {r.handle.deadline_s:g} s, "
                f"{r.handle.state.value}; waited for {r.whom()}"
            ),
        )

    def enter(self, r: Receive, source: Source) -> None:
        """Let a sender write from now on."""
        r.sources.append(source)
        link, inflow = source.link, source.inflow
        r.expect()
        r.handle.via(link.path)
        self.by_tid[link, inflow.tid] = (r, source)
        link.inflows[inflow.tid] = inflow
        inflow.broken = lambda e: self._engine.loop.call(lambda: self.fail(r, e))
        r.check_layers(range(inflow.extent.layers))
        small = inflow.total_bytes <= SMALL_BYTES and len(r.sources) == 1
        r.handle.seat = link.reader if small else None

    def withdraw(self, r: Receive, link: Link) -> None:
        """Forget an invitation that its sender has not taken and will not take."""
        with r.lock:
            for s in r.sources:
                if s.link is link and s.awaited:
                    s.inflow.stop()
                    self._drop(s)
                    r.leave(s)
                    return

    def _drop(self, s: Source) -> None:
        self.by_tid.pop((s.link, s.inflow.tid), None)
        s.link.inflows.pop(s.inflow.tid, None)

    def on_frame(
        self, link: Link, flow: Inflow, head: Header, fresh: list[int], again: list[int]
    ) -> bool:
        """A frame is in place; called on the thread that has received it.

        Returns whether the event loop has to be roused to see the end of the transfer.
        """
        if (entry := self.by_tid.get((link, flow.tid))) is None:
            return False
        r, source = entry
        if head.flags & SEALED:
            source.sealed = source.whole = True
        loop = self._engine.loop
        if again:
            where = [head.first + i for i in again[:8]]
            error = IntegrityError(
                f"blocks at positions {where} of layer {head.layer} from node {link.peer} "
                "arrived changed twice"
            )
            loop.call(lambda: self.fail(r, error))
            return False
        if fresh:
            r.handle.retried(len(fresh))
            spans = [(head.layer, head.first + i, 1) for i in fresh]
            loop.call(lambda: link.send(wire.Nack(flow.tid, spans)))
        if flow.layer_complete(head.layer):
            if not source.whole:
                loop.call(lambda: link.send(wire.LayerDone(flow.tid, head.layer)))
            if flow.complete and self.maybe_land(r):
                return True
            r.check_layers((head.layer,))
        return False

    def maybe_land(self, r: Receive) -> bool:
        """End a receive in success, if everything is there; from any thread.

        Its caller is told at once, on this thread; the books and the senders follow when the
        event loop, which is not roused here, comes to it.
        """
        engine = self._engine

        steps: list[Callable[[], object]] = [
            lambda: engine.report(r.handle, None),
            lambda: engine.loop.post(lambda: self._landed(r)),  # before what the caller does next
        ]

        def go_on() -> None:
            if r.pool is not None:
                r.pool.release(r)
            while steps:
                steps[0]()
                steps.pop(0)

        def first() -> None:
            try:
                go_on()
            except BaseException:  # whoever waits may be interrupted here: nothing is left out
                go_on()
                raise

        with r.lock:
            if r.error is not None or not r.complete:
                return False
            for s in r.sources:
                s.inflow.stop()
            made = r.destination is not None and r.destination.bounce_bytes
            blocks = r.destination.blocks() if made and r.destination is not None else ()
            if r.handle.take(Event.COMPLETE, blocks=blocks, first=first) is None:
                return False
        return True

    def _landed(self, r: Receive) -> None:
        """Keep the books of a receive that has landed, and tell its senders."""
        self._free(r)
        if r.fetch_from is None:
            self.ended[r.key] = End.landed(r)
        for s in r.sources:
            s.link.send(wire.Done(s.inflow.tid))
        self._follow(r)
        self._engine.completed(r.handle, None)
        for s in r.sources:
            if s.link.error is not None and (s.link, s.inflow.tid) in self.by_tid:
                self.on_release(s.link, s.inflow.tid)  # nobody else will say so

    def on_release(self, link: Link, tid: int) -> None:
        """The sender knows that it has landed."""
        entry = self.by_tid.get((link, tid))
        if entry is None or not entry[0].handle.awaits(Event.RELEASE):
            self._engine.ignore("release")
            return
        r, source = entry
        self._drop(source)
        source.released = True
        if all(s.released for s in r.sources):
            self._release(r)

    def _release(self, r: Receive) -> None:
        if r.handle.take(Event.RELEASE) is not None:
            for s in r.sources:
                self._drop(s)
            self._follow(r)

    def fail(self, r: Receive, error: CommError) -> None:
        """End a receive: tell its senders, fence its blocks, then tell its caller."""
        step = r.handle.take(ending(error))
        if step is None:
            return
        r.error = bare(error)
        self._follow(r)
        told = set()
        for link, tid in self._dismiss(r):
            link.send(failure(tid, error))
            told.add(link)
        for s in r.sources:
            if step.tells:
                s.link.send(failure(s.inflow.tid, error))
            told.add(s.link)
            self.by_tid.pop((s.link, s.inflow.tid), None)
            s.link.inflows.pop(s.inflow.tid, None)
            s.inflow.idle = lambda: self._engine.loop.call(lambda: self.quiet(r))
            s.inflow.stop()
        if r.fetch_from is None and (r.named or r.sources):
            self.ended[r.key] = End(error, None)
            self._engine.gossip(r.key, error, told)
        self.quiet(r)

    def quiet(self, r: Receive) -> None:
        """Finish a failed receive once no thread writes its blocks any more."""
        if any(s.inflow.busy for s in r.sources):
            return
        error = r.failure()
        if r in self.live:
            self._free(r)
        report = self._engine.report
        if r.handle.take(Event.IDLE, error=error, first=lambda: report(r.handle, error)):
            self._follow(r)
            self._engine.completed(r.handle, error)

    def _break_off(self, r: Receive) -> None:
        for s in r.sources:
            if s.inflow.busy:
                s.link.abort_data()

    def close(self, error: CommError) -> None:
        """Fail everything."""
        for r in list(self.live):
            self.fail(r, error)

    def _follow(self, r: Receive) -> None:
        """Keep the books and the limit of the phase that a receive is in now."""
        rule = RULES[r.handle.phase]
        if not rule.moves:
            if self.active.get(r.key) is r:
                del self.active[r.key]
            if r in self.unnamed:
                self.unnamed.remove(r)
        if rule.safe:
            self.live.discard(r)
        unconfirmed = r.handle.awaits(Event.RELEASE)
        if unconfirmed:
            self.unconfirmed.add(r)
        else:
            self.unconfirmed.discard(r)
        if r.watch is not None:
            r.watch.follow()
        if rule.safe and not unconfirmed:  # over: let go of what refers to it
            r.watch = None
            for s in r.sources:
                s.inflow.idle = s.inflow.broken = None

    def _free(self, r: Receive) -> None:
        """Give back leases and room; then let those start that waited for it."""
        if r.pool is not None:
            r.pool.release(r)
        if self._granter.give_back(r):
            self._room()
