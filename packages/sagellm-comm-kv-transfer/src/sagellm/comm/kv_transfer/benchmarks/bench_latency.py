"""One block of 64 KiB: from the sender's call until the receiver has it in place and knows it.

The two sides have met, and every receiver has waited for a millisecond. NIXL is used in both ways,
and judged by the better: the sender writes and notifies, or it tells the receiver, by a byte on a
socket, to read. A sample is the median of many turns, so that a row's median is the p50; `p99` rows
are the same turns' 99th percentile. The bytes are compared after every turn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from sagellm.core.protocols.bench import Benchmark, Case, Contenders, Ratio, Row

from ._lineup import PEERS, fastest, figure, medians, ours, run_pairs
from ._pair import Pair, regions
from ._turns import KIB
from ._worker import Spec

__all__ = ["main"]

_CONTENDERS: Mapping[str, Spec] = {
    "one plain socket": PEERS["one plain socket"],
    "gloo": PEERS["gloo, block by block"],
    "ZeroMQ": PEERS["ZeroMQ"],
    "Mooncake, tcp": PEERS["Mooncake, tcp"],
    **{
        f"{name}, {way}": replace(spec, options={**spec.options, "how": how})
        for name, spec in PEERS.items()
        if name.startswith("NIXL")
        for way, how in (("write", "write"), ("read", "told"))
    },
    "tcp, checks on": ours("tcp"),
    "tcp, checks off": ours("tcp", checksum=False),
    "shm, checks on": ours("shm"),
    "shm, checks off": ours("shm", checksum=False),
}


def cases(quick: bool) -> list[Case]:
    """One block, and how many turns make a sample."""
    turns = 50 if quick else 200
    case = {"nbytes": 64 * KIB, "block_bytes": 64 * KIB, "turns": turns}
    return [{**case, "percentile": p} for p in (50, 99)]


@contextlib.contextmanager
def contenders(case: Case) -> Iterator[Contenders]:
    """Every call returns seconds."""

    def sample(pair: Pair) -> float:
        turns: list[float] = sorted(pair.run_posted() for _ in range(case["turns"]))
        return turns[int(case["percentile"]) * len(turns) // 100]

    # A pool of many blocks, of which a turn moves one.
    with regions(case) as shared, run_pairs(_CONTENDERS, shared, sample) as named:
        yield named


def ratios(rows: Sequence[Row]) -> list[Ratio]:
    """Their time over ours: 1 / 0.7 is seven tenths of their time."""
    found = []
    p50 = medians(rows, percentile=50).values()
    for path, peer, theirs_of in (
        ("shm, checks on", "NIXL", fastest("NIXL, write", "NIXL, read")),
        ("tcp, checks on", "Mooncake, tcp", fastest("Mooncake, tcp")),
    ):
        pairs = [(theirs_of(c), c.get(path)) for c in p50]
        name = f"p50 of one 64 KiB block, {path}"
        found.append(figure(f"time of {peer}", name, round(1 / 0.7, 3), pairs))
    for row in rows:
        if row.contender not in PEERS and row.contender.startswith(("tcp", "shm")):
            case = medians(rows, percentile=row.case["percentile"])[str(dict(row.case))]
            mine = case.get(row.contender)
            for peer in _CONTENDERS:
                theirs = case.get(peer)
                if not peer.startswith(("tcp", "shm")):
                    value = theirs / mine if mine and theirs is not None else None
                    found.append(Ratio(f"{peer} / {row.contender}", row.case, value))
    return found


main = Benchmark(
    "kv_transfer.latency",
    contenders,
    cases=cases,
    ratios=ratios,
    metric="latency",
    repeats=5,
    distributions=(
        "torch", "numpy", "xxhash", "nixl-cu12", "mooncake-transfer-engine-non-cuda", "pyzmq",
    ),
).main  # fmt: skip

if __name__ == "__main__":
    raise SystemExit(main())
