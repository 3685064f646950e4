"""Random blocks from one process into random blocks of another, over loopback TCP.

Contenders, in one run: this channel with checksums on and off; one plain socket that sends as
many contiguous bytes into a contiguous buffer; gloo send/recv of gathered blocks, scattered at
the end; a copy by one thread inside one process, which is the bound of any of them. Loopback
TCP is a test of copying by the CPU, not of a network.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from sagellm.comm.kv_transfer.benchmarks._peer import (
    block_ids,
    channel_with,
    gloo_group,
    make_pool,
    serve,
)
from sagellm.comm.kv_transfer.memory import bytes_of
from sagellm.core.protocols import DistributedRuntimeError, TransferKey
from sagellm.core.protocols.bench import Benchmark, Case, Contenders, Ratio, Row

__all__ = ["main"]

KIB, MIB = 1 << 10, 1 << 20


def cases(quick: bool) -> list[Case]:
    """Sizes of a transfer and of its blocks."""
    sizes = [64 * MIB] if quick else [256 * MIB]
    blocks = [64 * KIB, 1 * MIB] if quick else [64 * KIB, 256 * KIB, 1 * MIB, 4 * MIB]
    return [{"nbytes": n, "block_bytes": b} for n in sizes for b in blocks]


@contextlib.contextmanager
def contenders(case: Case) -> Iterator[Contenders]:
    """The receiving side; every call returns bytes per second."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    nbytes, block_bytes = case["nbytes"], case["block_bytes"]
    pool = make_pool(nbytes, block_bytes, seed=2)
    want = make_pool(nbytes, block_bytes, seed=1)
    flat = bytes_of(pool)[:nbytes]
    spare = torch.empty((nbytes // block_bytes, block_bytes), dtype=torch.uint8).fill_(1)
    turns = iter(range(1 << 30))
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="sagellm-bench-"))
        store = str(Path(folder) / "store")
        ours, theirs = context.Pipe()
        peer = context.Process(target=serve, args=(theirs, dict(case), store), daemon=True)
        peer.start()
        theirs.close()
        stack.callback(peer.join, 30)
        stack.callback(ours.close)
        stack.enter_context(gloo_group(1, store))
        channels = {
            name: stack.enter_context(channel_with(1, checksum=on, pool=pool))
            for name, on in (("checked", True), ("unchecked", False))
        }
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, MIB)
        listener.settimeout(60)
        where = f"127.0.0.1:{listener.getsockname()[1]}"
        ours.send({"socket": where, **{n: c.address for n, c in channels.items()}})
        plain = stack.enter_context(listener.accept()[0])
        plain.settimeout(None)

        def through_channel(name: str) -> float:
            turn = next(turns)
            into = block_ids(nbytes, block_bytes, turn, 1)
            handle = channels[name].receive(TransferKey(f"{name}-{turn}"), into)
            started = time.perf_counter()
            ours.send((name, turn))
            handle.wait()
            seconds = time.perf_counter() - started
            for i in (0, len(into) // 2, len(into) - 1):
                source = block_ids(nbytes, block_bytes, turn, 0)[i]
                if not torch.equal(pool[int(into[i])], want[int(source)]):
                    raise DistributedRuntimeError(f"block {i} of turn {turn} is not what was sent")
            return float(nbytes / seconds)

        def through_socket() -> float:
            started = time.perf_counter()
            ours.send(("socket", 0))
            got = 0
            while got < nbytes:
                got += plain.recv_into(flat[got:])
            return float(nbytes / (time.perf_counter() - started))

        def through_gloo() -> float:
            turn = next(turns)
            into = block_ids(nbytes, block_bytes, turn, 1)
            started = time.perf_counter()
            ours.send(("gloo", turn))
            dist.recv(spare, 0)
            pool.index_copy_(0, torch.from_numpy(into), spare)
            return float(nbytes / (time.perf_counter() - started))

        def copy() -> float:
            started = time.perf_counter()
            spare.copy_(pool[: len(spare)])
            return float(nbytes / (time.perf_counter() - started))

        yield {
            "channel": lambda: through_channel("checked"),
            "channel, checks off": lambda: through_channel("unchecked"),
            "one plain socket": through_socket,
            "gloo": through_gloo,
            "memcpy, one thread": copy,
        }


def ratios(rows: Sequence[Row]) -> list[Ratio]:
    """The channel over each of the others."""
    found = {(str(r.case), r.contender): r for r in rows}
    result = []
    for row in rows:
        if not row.contender.startswith("channel"):
            continue
        for other in ("one plain socket", "gloo", "memcpy, one thread"):
            base = found[str(row.case), other].median
            value = row.median / base if row.median and base else None
            goal = 3.0 if (other, row.contender) == ("gloo", "channel, checks off") else None
            result.append(Ratio(f"{row.contender} / {other}", row.case, value, goal))
    return result


main = Benchmark(
    "kv_transfer.transfer",
    contenders,
    cases=cases,
    ratios=ratios,
    metric="throughput",
    unit="bytes_per_s",
    better="higher",
    distributions=("torch", "numpy", "xxhash"),
).main

if __name__ == "__main__":
    raise SystemExit(main())
