"""Random blocks from one process into random blocks of another: how fast, against whom.

Contenders are pairs of processes, interleaved in random order within each repetition. The time
runs from the first side's start until the receiver has the last byte in place and knows it,
tables of blocks included; what arrived is compared with what was sent after every turn. Five
kinds of work:

* `blocks`: 256 MiB and 1 GiB in blocks of 64 KiB to 4 MiB;
* `gil`: the same while a Python thread of the receiver holds the GIL;
* `link`: over a link shaped to 1 Gbit/s between two network namespaces, which needs root;
* `many`: 1 000 transfers of 1 MiB, at once and one after the other;
* `device`: scattered blocks of a GPU to the host, which needs one.

Loopback is a test of copying by the CPU, not of a network: RDMA and fast links are unverified.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from sagellm.comm.kv_transfer.staging import HostStaging
from sagellm.core.protocols import DistributedRuntimeError
from sagellm.core.protocols.bench import Benchmark, Case, Contenders, Missing, Ratio, Row
from sagellm.core.protocols.netns import ShapedHosts, why_not

from ._lineup import PEERS, best, figure, medians, ours, run_pairs
from ._pair import Pair, regions
from ._turns import GIB, KIB, MIB, pool_blocks
from ._worker import Spec

__all__ = ["main"]

_BLOCKS = {
    **PEERS,
    "tcp, checks off": ours("tcp", checksum=False),
    "tcp, checks on": ours("tcp", checksum=True),
    "shm, checks off": ours("shm", checksum=False),
    "shm, checks on": ours("shm", checksum=True),
}
_GIL = {
    "tcp": ours("tcp"),
    "tcp, GIL held": ours("tcp", hog=True),
    "shm, copy worker": ours("shm", copy_workers=1),
    "shm, copy worker, GIL held": ours("shm", hog=True, copy_workers=1),
}
_LINK = {"tcp": ours("tcp"), "one plain socket": PEERS["one plain socket"]}


def _many(transport: str, concurrent: bool) -> Spec:
    end = f"{__package__}._ours:ManyTransfers"
    return Spec(end, {"transport": transport, "concurrent": concurrent})


_MANY = {
    f"{transport}, {how}": _many(transport, how == "concurrent")
    for transport in ("tcp", "shm")
    for how in ("concurrent", "sequential")
}


def cases(quick: bool) -> list[Case]:
    """All kinds of work; quick: smaller, and fewer sizes."""
    sizes = [64 * MIB] if quick else [256 * MIB, GIB]
    blocks = [64 * KIB, MIB] if quick else [64 * KIB, 256 * KIB, MIB, 4 * MIB]
    transfers = 100 if quick else 1000
    return [
        *({"work": "blocks", "nbytes": n, "block_bytes": b} for n in sizes for b in blocks),
        {"work": "gil", "nbytes": 64 * MIB, "block_bytes": 64 * KIB},
        {"work": "link", "nbytes": (16 if quick else 64) * MIB, "block_bytes": 64 * KIB},
        {
            "work": "many", "nbytes": transfers * MIB, "block_bytes": 64 * KIB,
            "transfers": transfers,
        },
        {"work": "device", "nbytes": 256 * MIB, "block_bytes": 64 * KIB},
    ]  # fmt: skip


@contextlib.contextmanager
def contenders(case: Case) -> Iterator[Contenders]:
    """The pairs of a case; every call returns bytes per second."""
    nbytes = case["nbytes"]
    if case["work"] == "device":
        yield _device(case)
        return
    posted: Callable[[Pair], float] = lambda pair: nbytes / pair.run_posted()  # noqa: E731
    both: Callable[[Pair], float] = lambda pair: nbytes / pair.run().seconds  # noqa: E731
    with contextlib.ExitStack() as stack:
        shared = stack.enter_context(regions(case))
        hosts = None
        if case["work"] == "link":
            if (reason := why_not()) is not None:
                yield {name: Missing(reason) for name in _LINK}
                return
            hosts = stack.enter_context(ShapedHosts("1gbit"))
        specs: Mapping[str, Spec] = {
            "blocks": _BLOCKS, "gil": _GIL, "link": _LINK, "many": _MANY,
        }[case["work"]]  # fmt: skip
        measure = posted if case["work"] == "gil" else both
        yield stack.enter_context(run_pairs(specs, shared, measure, hosts))


def _device(case: Case) -> Contenders:
    """Within one process: gathering and copying by `HostStaging`, and one plain pinned copy."""
    import torch

    if not torch.cuda.is_available():
        reason = Missing("no CUDA or ROCm device here")
        return {"gather and copy to the host": reason, "one pinned copy to the host": reason}
    return _on_device(case)  # pragma: device-only


def _on_device(case: Case) -> Contenders:  # pragma: device-only
    import numpy as np
    import torch

    total = pool_blocks(case)
    pool = torch.randint(0, 256, (total, case["block_bytes"]), dtype=torch.uint8, device="cuda")
    count = case["nbytes"] // case["block_bytes"]
    host = torch.empty((count, case["block_bytes"]), dtype=torch.uint8, pin_memory=True)
    staging = HostStaging(pool)
    turns = itertools.count()

    def staged() -> float:
        ids = np.random.default_rng(next(turns)).permutation(total)[:count]
        want = pool[torch.from_numpy(ids[-1:]).cuda()].cpu()
        started = time.perf_counter()
        for _, chunk in staging.read(ids):
            last = chunk
        rate = case["nbytes"] / (time.perf_counter() - started)
        if not torch.equal(last[-1:], want):
            raise DistributedRuntimeError("the last block is not what the device holds")
        return float(rate)

    def plain() -> float:
        started = time.perf_counter()
        host.copy_(pool[:count], non_blocking=True)
        torch.cuda.synchronize()
        return float(case["nbytes"] / (time.perf_counter() - started))

    return {"gather and copy to the host": staged, "one pinned copy to the host": plain}


def ratios(rows: Sequence[Row]) -> list[Ratio]:
    """The rows of the table of figures, then every case of `blocks` by itself."""
    blocks = medians(rows, work="blocks")
    nixl = best("NIXL", "NIXL, no progress thread")
    nixl_tcp = best("NIXL, tcp", "NIXL, tcp, no progress thread")
    gloo = best("gloo, block by block", "gloo, gathered")
    judged: list[tuple[str, str, Callable[[Mapping[str, float]], Any], float, str]] = [
        ("shm, checks off", "memcpy, one thread", best("memcpy, one thread"), 0.9, "median"),
        ("shm, checks off", "memcpy, one thread", best("memcpy, one thread"), 0.7, "worst"),
        ("shm, checks on", "memcpy, one thread", best("memcpy, one thread"), 0.55, "median"),
        ("tcp, checks off", "Mooncake, tcp", best("Mooncake, tcp"), 4.0, "median"),
        ("tcp, checks off", "Mooncake, tcp", best("Mooncake, tcp"), 2.2, "worst"),
        ("tcp, checks on", "Mooncake, tcp", best("Mooncake, tcp"), 3.0, "median"),
        ("tcp, checks off", "NIXL, tcp, default", best("NIXL, tcp"), 7.0, "median"),
        ("tcp, checks off", "NIXL, tcp, best", nixl_tcp, 4.3, "median"),
        ("tcp, checks off", "ZeroMQ", best("ZeroMQ"), 2.2, "median"),
        ("tcp, checks off", "gloo, best", gloo, 3.0, "median"),
    ]
    found = [
        figure(path, name, goal, [(c.get(path), theirs(c)) for c in blocks.values()], over=over)
        for path, name, theirs, goal, over in judged
    ]
    for block, shown, default, at_best in (
        (64 * KIB, "64 KiB", 4.5, 3.5),
        (MIB, "1 MiB", 2.6, 2.1),
    ):
        some = medians(rows, work="blocks", block_bytes=block).values()
        for name, theirs, goal in (("default", best("NIXL"), default), ("best", nixl, at_best)):
            pairs = [(c.get("shm, checks off"), theirs(c)) for c in some]
            found.append(figure("shm, checks off", f"NIXL, {name}, blocks of {shown}", goal, pairs))
    for work, path, other, goal in (
        ("gil", "tcp, GIL held", "tcp", 0.45),
        ("gil", "shm, copy worker, GIL held", "shm, copy worker", 0.5),
        ("link", "tcp", "one plain socket", 0.95),
        ("many", "tcp, concurrent", "tcp, sequential", 0.9),
        ("many", "shm, concurrent", "shm, sequential", 0.9),
        ("device", "gather and copy to the host", "one pinned copy to the host", 0.85),
    ):
        pairs = [(c.get(path), c.get(other)) for c in medians(rows, work=work).values()]
        against = f"{other}, link of 1 Gbit/s" if work == "link" else other
        found.append(figure(path, against, goal, pairs))
    return found + _each_case(rows)


_BESIDE = {
    "shm": ("memcpy, one thread", "NIXL", "NIXL, no progress thread"),
    "tcp": tuple(n for n in PEERS if n not in ("NIXL", "NIXL, no progress thread")),
}


def _each_case(rows: Sequence[Row]) -> list[Ratio]:
    """Ours over each peer of the same path in each case, without goals."""
    blocks = medians(rows, work="blocks")
    found = []
    for row in rows:
        if row.case["work"] != "blocks" or row.contender in PEERS:
            continue
        case = blocks.get(str(dict(row.case)), {})
        mine = case.get(row.contender)
        for peer in _BESIDE[row.contender.partition(",")[0]]:
            theirs = case.get(peer)
            value = mine / theirs if mine is not None and theirs else None
            found.append(Ratio(f"{row.contender} / {peer}", row.case, value))
    return found


main = Benchmark(
    "kv_transfer.transfer",
    contenders,
    cases=cases,
    ratios=ratios,
    metric="throughput",
    unit="bytes_per_s",
    better="higher",
    repeats=5,
    distributions=(
        "torch", "numpy", "xxhash", "nixl-cu12", "mooncake-transfer-engine-non-cuda", "pyzmq",
    ),
    launch_timeout_s=3600.0,
).main  # fmt: skip

if __name__ == "__main__":
    raise SystemExit(main())
