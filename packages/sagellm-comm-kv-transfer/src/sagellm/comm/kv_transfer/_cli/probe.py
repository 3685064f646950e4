"""`probe`: whether a node can be reached, over what, and how fast."""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import TYPE_CHECKING, Any

from sagellm.core.protocols import CommError, TransferKey
from sagellm.core.protocols.show import bytes_text, print_json, print_line, rate_text

from .node import (
    add_node_arguments,
    add_peer_arguments,
    open_channel,
    positive_bytes,
    transfer_name,
)

if TYPE_CHECKING:
    from sagellm.comm.kv_transfer import KVTransferChannel

__all__ = ["add_probe", "probe"]

_ROUNDS = 7
_TAKEN_S = 5.0


def add_probe(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    add_peer_arguments(parser)
    add_node_arguments(parser, None)
    parser.add_argument(
        "--bytes", type=positive_bytes, default=4 << 20, dest="nbytes",
        help="size of the transfer that is timed, default 4M",
    )  # fmt: skip


def probe(arguments: argparse.Namespace) -> int:
    """Run it; the exit code."""
    with open_channel(arguments, host=arguments.host) as channel:
        started = time.perf_counter()
        info = channel.connect(arguments.peer, arguments.timeout_s)
        met_s = time.perf_counter() - started
        rounds = []
        for _ in range(_ROUNDS):
            started = time.perf_counter()
            channel.inspect(arguments.peer, arguments.timeout_s)
            rounds.append(time.perf_counter() - started)
        found: dict[str, Any] = {
            "node": info.node_id,
            "address": info.address,
            "protocol_version": info.protocol_version,
            "path": info.path,
            "why": channel.explain(arguments.peer),
            "layout": None if info.layout is None else repr(info.layout),
            "handshake_s": met_s,
            "round_trip_s": median(rounds),
            **_transfer(channel, arguments),
        }
    if arguments.json:
        print_json(found)
    else:
        _print(found, arguments.nbytes)
    return 0


def _transfer(channel: KVTransferChannel, arguments: argparse.Namespace) -> dict[str, Any]:
    """The rate of one transfer, the second of two; a node that takes none is no failure."""
    import torch

    data = torch.randint(0, 256, (arguments.nbytes,), dtype=torch.uint8)
    rate = None
    try:
        for _ in range(2):
            key = TransferKey(transfer_name("probe"))
            started = time.perf_counter()
            deadline_s = min(_TAKEN_S, arguments.timeout_s)
            handle = channel.transfer([data], arguments.peer, key=key, deadline_s=deadline_s)
            handle.wait()
            rate = arguments.nbytes / (time.perf_counter() - started)
    except CommError as e:
        return {"bytes_per_s": rate, "transfer_error": str(e)}
    return {"bytes_per_s": rate, "transfer_error": None}


def _print(found: dict[str, Any], nbytes: int) -> None:
    print_line(f"node {found['node']} at {found['address']}")
    print_line(f"  protocol    version {found['protocol_version']}")
    print_line(f"  path        {found['path']}")
    print_line(f"  why         {found['why']}")
    print_line(f"  layout      {found['layout'] or 'no pool is registered'}")
    print_line(f"  handshake   {found['handshake_s'] * 1e3:.1f} ms")
    print_line(f"  round trip  {found['round_trip_s'] * 1e6:.0f} us")
    if found["transfer_error"] is None:
        print_line(f"  {bytes_text(nbytes):11} {rate_text(found['bytes_per_s'])} GB/s")
    else:
        print_line(f"  {bytes_text(nbytes):11} not taken: {found['transfer_error']}")
