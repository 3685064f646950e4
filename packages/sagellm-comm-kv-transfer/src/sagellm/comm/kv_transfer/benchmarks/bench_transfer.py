"""Random blocks from one process into random blocks of another: how fast, against whom.

Contenders are pairs of processes, interleaved in random order within each repetition. The time
runs from the first side's start until the receiver has the last byte in place and knows it,
tables of blocks included; what arrived is compared with what was sent after every turn. Four
kinds of work:

* `blocks`: 256 MiB and 1 GiB in blocks of 64 KiB to 4 MiB;
* `gil`: the same while a Python thread of the receiver holds the GIL;
* `link`: over a link shaped to 1 Gbit/s between two network namespaces, which needs root;
* `many`: 1 000 transfers of 1 MiB, at once and one after the other.

Loopback is a test of copying by the CPU, not of a network: RDMA and fast links are unverified.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from sagellm.core.protocols.bench import Benchmark, Case, Contenders, Missing, Ratio, Row
from sagellm.core.protocols.netns import ShapedHosts, why_not

from ._lineup import PEERS, best, figure, medians, ours, run_pairs
from ._pair import Pair, regions
from ._turns import GIB, KIB, MIB
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
    ]  # fmt: skip


@contextlib.contextmanager
def contenders(case: Case) -> Iterator[Contenders]:
    """The pairs of a case; every call returns bytes per second."""
    nbytes = case["nbytes"]
    posted: Callable[[Pair], float] = lambda pair: nbytes / pair.run_posted().seconds  # noqa: E731
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
    warmup=1,
    distributions=(
        "torch", "numpy", "xxhash", "nixl-cu12", "mooncake-transfer-engine-non-cuda", "pyzmq",
    ),
    launch_timeout_s=3600.0,
).main  # fmt: skip

if __name__ == "__main__":
    raise SystemExit(main())
