"""Which ranks of a group share a host: proven for every member, and known alike on all ranks."""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sagellm.core.protocols import CommError, CommTimeoutError
from sagellm.core.protocols.process_group import TorchObject

from . import handshake
from .exchange import Exchange
from .handshake import Listener
from .identity import host_claim

__all__ = ["Hosts", "candidates", "claim", "prove_hosts"]

_PROOF_S = 5.0
_KEYS = {"boot": "boot id", "net": "network namespace", "uid": "user"}


@dataclass(frozen=True, slots=True)
class Hosts:
    """How a group lies on hosts.

    Attributes:
        partition: The ranks of each host, ascending; hosts by their lowest rank.
        reasons: Of ranks that seemed to share a host and could not prove it: why.

    """

    partition: tuple[tuple[int, ...], ...]
    reasons: Mapping[int, str] = field(default_factory=dict)

    def of(self, rank: int) -> tuple[int, ...]:
        """The ranks on `rank`'s host, itself among them."""
        return next(host for host in self.partition if rank in host)

    def explain(self) -> str:
        """One sentence: who is where, and who could not prove what it said."""
        text = "; ".join(f"host {i}: ranks {list(host)}" for i, host in enumerate(self.partition))
        split = "".join(f"; rank {r} is apart: {why}" for r, why in sorted(self.reasons.items()))
        return text + split


def claim() -> dict[str, Any]:  # Any: JSON
    """What this rank says of its host, or why it can say nothing."""
    if not hasattr(os, "memfd_create"):
        return {"why": "its system has no memfd_create, which is Linux's"}
    try:
        return host_claim()
    except OSError as e:
        return {"why": f"its host cannot be told: {e}"}


def candidates(claims: Sequence[Mapping[str, Any]]) -> list[list[int]]:  # Any: JSON
    """Ranks whose claims are alike, by their lowest; a rank without a claim is alone."""
    found: dict[object, list[int]] = {}
    for rank, said in enumerate(claims):
        key: object = rank if "why" in said else tuple(str(said[k]) for k in _KEYS)
        found.setdefault(key, []).append(rank)
    return list(found.values())


def difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:  # Any: JSON
    """Why two claims are not of one host; empty if they may be."""
    if "why" in ours or "why" in theirs:
        return str(theirs.get("why") or ours.get("why"))
    parts = [name for key, name in _KEYS.items() if ours[key] != theirs[key]]
    return f"another {' and '.join(parts)}" if parts else ""


def prove_hosts(
    store: TorchObject, rank: int, size: int, timeout_s: float, *, label: str = "world"
) -> Hosts:
    """How the ranks of a group lie on hosts, the same answer on all of them. Collective.

    A rank's boot id, network namespace and user say where it may be. The lowest rank of each
    such set then makes a page of memory and hands it to the others over a UNIX socket; who cannot
    say what stands in it counts as a host of its own. Host names and LOCAL_WORLD_SIZE are not read.

    Args:
        store: Store shared by the ranks.
        rank: This rank.
        size: Ranks.
        timeout_s: Longest time for all of it.
        label: Tells apart groups of different ranks over one store.

    Raises:
        CommTimeoutError: Some rank did not come; it is named.
        DistributedRuntimeError: The store failed.

    """
    if size == 1:
        return Hosts(((0,),))
    exchange = Exchange(store, rank, size, f"hosts/{label}", timeout_s)
    said = claim()
    listener = None if "why" in said else Listener(2 * size + 16)
    try:
        if listener is not None:
            said |= {"address": listener.address, "nonce": listener.nonce.hex()}
        claims = exchange.all("claim", said)
        groups = candidates(claims)
        mine = next(group for group in groups if rank in group)
        if listener is None or len(mine) == 1:
            verdicts = exchange.all("proof", {})
        elif rank == mine[0]:
            verdicts = _as_leader(exchange, listener, mine, claims)
        else:
            verdicts = exchange.all("proof", _as_member(exchange, listener, mine[0], claims))
        exchange.leave()
    finally:
        if listener is not None:
            listener.close()
    return _judge(groups, claims, verdicts)


def _as_leader(
    exchange: Exchange, listener: Listener, mine: Sequence[int], claims: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:  # Any: JSON
    secret = secrets.token_bytes(16)
    nonces = {r: bytes.fromhex(claims[r]["nonce"]) for r in mine}
    wanted = set(mine[1:])
    fd = os.memfd_create("sagellm-comm-proof", os.MFD_CLOEXEC)
    try:
        os.write(fd, secret.ljust(mmap.PAGESIZE, b"\0"))

        def serve() -> None:
            for peer, link in listener.serve(exchange.rank, nonces, wanted).items():
                wanted.discard(peer)
                with contextlib.suppress(OSError):  # it will say itself that it got nothing
                    handshake.send(link, b"page", fd)
                link.close()

        return exchange.all("proof", {"secret": secret.hex()}, serve)
    finally:
        os.close(fd)


def _as_member(
    exchange: Exchange, listener: Listener, leader: int, claims: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:  # Any: JSON
    nonce = bytes.fromhex(claims[leader]["nonce"])
    deadline = min(exchange.deadline, time.monotonic() + _PROOF_S)
    try:
        link = handshake.connect(
            claims[leader]["address"], exchange.rank, listener.nonce, leader, nonce, deadline
        )
        with link:
            left_s = max(0.0, deadline - time.monotonic())
            if not handshake.take_replies({leader: link}, listener.nonce, {leader: nonce}, left_s):
                raise CommTimeoutError(f"rank {leader} gave no answer in {_PROOF_S} s")
            _, fd = handshake.receive(link, leader)
        try:
            with mmap.mmap(fd, mmap.PAGESIZE, prot=mmap.PROT_READ) as page:
                return {"secret": page[:16].hex()}
        finally:
            os.close(fd)
    except (CommError, OSError, ValueError) as e:
        return {"why": str(e)}


def _judge(
    groups: Sequence[Sequence[int]],
    claims: Sequence[Mapping[str, Any]],
    verdicts: Sequence[Mapping[str, Any]],
) -> Hosts:
    hosts: list[tuple[int, ...]] = []
    reasons: dict[int, str] = {r: str(c["why"]) for r, c in enumerate(claims) if "why" in c}
    for group in groups:
        secret = verdicts[group[0]].get("secret")
        together = [r for r in group[1:] if secret and verdicts[r].get("secret") == secret]
        for rank in set(group[1:]) - set(together):
            why = verdicts[rank].get("why", "it could not read the page of its host's lowest rank")
            reasons[rank] = str(why)
            hosts.append((rank,))
        hosts.append((group[0], *together))
    return Hosts(tuple(sorted(hosts)), reasons)
