"""What this node knows of one transfer that it receives, and of each of its senders."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from sagellm.core.protocols import CommError, ConfigError, KVLayout, KVTransferError, TransferKey

from ._block_table import BlockTable
from ._bounce import Destination
from ._coded_request import CodecRequest
from ._flows import Inflow
from ._limits import Watch
from ._link import Link
from .plan import Part, coverage_gap, shared_parts, wanted_part
from .pool import RegisteredPool
from .transfer import TransferHandle, transfer_error

__all__ = ["End", "Receive", "Source"]


class End(NamedTuple):
    """How a transfer ended here: None is success."""

    error: CommError | None
    fingerprint: int | None
    handle: Callable[[], TransferHandle | None] = lambda: None
    """Its handle, for as long as somebody has it: it may own what came."""
    num_tokens: int = 0

    @classmethod
    def landed(cls, r: Receive) -> End:
        """How this one did."""
        handle = r.handle
        return cls(None, r.fingerprint(), weakref.ref(handle), handle.num_tokens)


class Source:
    """One sender of a receive."""

    def __init__(
        self,
        link: Link,
        inflow: Inflow,
        parts: Mapping[str, Part],
        *,
        sealed: bool,
        whole: bool | None = None,
        invited: bool = False,
    ) -> None:
        self.link = link
        self.inflow = inflow
        self.parts = parts
        self.sealed = sealed
        self.whole = sealed if whole is None else whole
        """Whether its sender never waits for a layer: it is no stream."""
        self.invited = invited
        self.released = False

    @property
    def awaited(self) -> bool:
        """Whether it was invited and has sent nothing yet."""
        return self.invited and not self.sealed and not self.inflow.begun


class Receive:
    """One transfer into this node.

    Args:
        handle: What the caller holds.
        blocks: Destinations in the pool; None leaves them to the sender, or to bounce buffers.
        senders: The nodes it comes from; None takes any.
        named: Whether the caller gave the key.
        adopts: Whether a sender may name the destinations.

    """

    def __init__(
        self,
        handle: TransferHandle,
        blocks: BlockTable | None,
        senders: frozenset[int] | None,
        *,
        pool: RegisteredPool | None,
        named: bool = True,
        adopts: bool = False,
    ) -> None:
        self.handle = handle
        self.blocks = blocks
        self.senders = senders
        self.pool = pool
        self.named = named
        self.adopts = adopts
        self.fetch_from: tuple[int, ...] | None = None
        self.fetch_layers: Sequence[int] | None = None
        self.fetch_codec: CodecRequest | None = None
        self.sources: list[Source] = []
        self.wanted: dict[str, Part] = {}
        self.open_groups: set[str] = set()
        self.destination: Destination | None = None
        self.error: CommError | None = None
        self.lock = threading.RLock()
        """Held while senders join or leave, and while it lands: no sender joins what has."""
        self.watch: Watch | None = None
        self.expect()

    @property
    def key(self) -> TransferKey:
        """Its key."""
        return self.handle.key

    def want(self, layout: KVLayout, shared: Mapping[str, Part]) -> None:
        """Know what has to come, now that one more sender says what it shares.

        Raises:
            ConfigError: The senders are sharded along different axes.

        """
        for group in layout.groups:  # a group of which a sender has nothing is still wanted
            known = [s.parts for s in self.sources]
            parts = [p[group.name] for p in (*known, shared) if group.name in p]
            if (before := self.wanted.get(group.name)) is not None:
                parts.append(before)
            self.wanted[group.name] = wanted_part(group, parts)

    def missing(self, layout: KVLayout, theirs: KVLayout) -> dict[str, Part]:
        """What a peer has of our blocks that nobody was granted before it.

        Raises:
            ConfigError: Its parts and those of the others do not fit together.

        """
        parts = {}
        shared = shared_parts(layout, theirs)
        self.want(layout, shared)
        for name, part in shared.items():
            if not part.axis:  # it has all, of which others may have brought a part
                part = self.wanted[name]
            granted = [p for s in self.sources if (p := s.parts.get(name)) is not None]
            gaps = coverage_gap(part, granted)
            if len(gaps) > 1:
                raise ConfigError(f"group {name!r}: senders overlap in more than one interval")
            if gaps:
                parts[name] = Part(part.axis, *gaps[0])
        return parts

    def expect(self) -> None:
        """What its senders bring, and what nobody brings yet."""
        self.open_groups = self._gaps(self.sources)
        self.handle.expect(
            sum(s.inflow.total_bytes for s in self.sources),
            sum(s.inflow.total_units for s in self.sources),
            max((s.inflow.extent.layers for s in self.sources), default=self._own_layers()),
        )

    def _own_layers(self) -> int:
        return 0 if self.pool is None else len(self.pool.group_names)

    def leave(self, source: Source) -> None:
        """Do without a sender; readers look at both, and must not see a layer without its gap."""
        rest = [s for s in self.sources if s is not source]
        if not rest:  # whoever comes next may be sharded in another way
            self.wanted = {}
        self.open_groups = self._gaps(rest)
        self.sources = rest
        self.handle.seat = None
        self.expect()

    def _gaps(self, sources: Sequence[Source]) -> set[str]:
        return {
            name
            for name, part in self.wanted.items()
            if coverage_gap(part, [p for s in sources if (p := s.parts.get(name)) is not None])
        }

    def check_layers(self, layers: Sequence[int]) -> None:
        """Report those of these layers that are in place and verified."""
        names = self.destination.group_names if self.destination is not None else []
        done = [
            i
            for i in layers
            if self.sources
            and not (names and names[i] in self.open_groups)
            and all(s.inflow.layer_complete(i) for s in self.sources)
        ]
        if done:
            self.handle.layers_done(done)

    @property
    def complete(self) -> bool:
        """Whether every sender has brought all it was to bring, and nothing is missing."""
        for s in self.sources:
            if not s.sealed or not s.inflow.complete:
                return False
        if self.open_groups:
            counts = self.destination.counts if self.destination is not None else {}
            if any(counts.get(name, 1) for name in self.open_groups):
                return False
        return bool(self.sources)

    @property
    def came(self) -> set[int]:
        """Nodes that have begun to send."""
        return {s.link.peer for s in self.sources if not s.awaited}

    def whom(self) -> str:
        """Who has to do something before it can land, in words."""
        came = self.came
        if self.fetch_from is not None:
            names = ", ".join(map(str, self.fetch_from))
            return f"node {names}" + ("" if came else ", which never came")
        if self.senders is not None and (absent := sorted(self.senders - came)):
            return f"node {', '.join(map(str, absent))}, which never came"
        if not came:
            return "any node: nobody sent it"
        if unsealed := sorted({s.link.peer for s in self.sources if not s.sealed}):
            return f"node {', '.join(map(str, unsealed))} to seal its stream"
        counts = self.destination.counts if self.destination is not None else {}
        if lacking := sorted(n for n in self.open_groups if counts.get(n, 1)):
            return f"another node: nobody has sent all that blocks of {', '.join(lacking)} hold"
        return f"node {', '.join(map(str, sorted(came)))}; {self.handle.progress}"

    def failure(self) -> KVTransferError:
        """What its caller is told."""
        assert self.error is not None, "only failed receives have one"
        nodes = sorted(self.came | (self.senders or frozenset()))
        who = f"from node {', '.join(map(str, nodes))}" if nodes else "from any node"
        return transfer_error(self.key, who, self.error, self.blocks or {})

    def fingerprint(self) -> int | None:
        """Tells destinations apart; None when there are none."""
        if self.blocks is None:
            return None
        return hash(tuple((n, ids.tobytes()) for n, ids in sorted(self.blocks.items())))
