"""What moving and waiting cost: processor seconds of both sides, and memory.

Cases differ in `per`, which says what a figure counts:

* `GB`: processor seconds per 1e9 bytes, both processes and their children together;
* `second`: processor seconds per second of a connected pair that has nothing to do, of its
  busier side;
* `byte`: anonymous memory that both sides have taken more at the worst moment of 1 000
  transfers of 1 MiB at once than before them, over the bytes that they move.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from sagellm.core.protocols.bench import Benchmark, Case, Contenders, Ratio, Row

from ._lineup import PEERS, figure, medians, ours, run_pairs
from ._pair import Pair, regions
from ._turns import KIB, MIB
from ._worker import Spec

__all__ = ["main"]

_MOVING: Mapping[str, Spec] = {
    **{n: s for n, s in PEERS.items() if n != "memcpy, one thread"},
    "tcp, checks on": ours("tcp"),
    "tcp, checks off": ours("tcp", checksum=False),
    "shm, checks on": ours("shm"),
    "shm, checks off": ours("shm", checksum=False),
}
_IDLE: Mapping[str, Spec] = {
    "NIXL": PEERS["NIXL"],
    "Mooncake, tcp": PEERS["Mooncake, tcp"],
    "tcp": ours("tcp"),
    "shm": ours("shm"),
}
_MANY: Mapping[str, Spec] = {
    path: Spec(f"{__package__}._ours:ManyTransfers", {"transport": path, "concurrent": True})
    for path in ("tcp", "shm")
}
_IDLE_GOAL = 0.005
_MEMORY_GOAL = 0.25


def cases(quick: bool) -> list[Case]:
    """One for each kind of cost."""
    nbytes = (64 if quick else 256) * MIB
    transfers = 100 if quick else 1000
    return [
        *({"per": "GB", "nbytes": nbytes, "block_bytes": b} for b in (64 * KIB, MIB)),
        {"per": "second", "nbytes": MIB, "block_bytes": 64 * KIB, "seconds": 1 if quick else 5},
        {
            "per": "byte", "nbytes": transfers * MIB, "block_bytes": 64 * KIB,
            "transfers": transfers,
        },
    ]  # fmt: skip


@contextlib.contextmanager
def contenders(case: Case) -> Iterator[Contenders]:
    """Every call returns the cost that `per` names."""

    def moving(pair: Pair) -> float:
        return pair.run().cpu_seconds * 1e9 / float(case["nbytes"])

    def idle(pair: Pair) -> float:
        return pair.idle_share(case["seconds"])

    def memory(pair: Pair) -> float:
        with _watched(pair) as most:
            pair.run()
        return most() / float(case["nbytes"])

    kinds: Mapping[str, tuple[Mapping[str, Spec], Callable[[Pair], float]]] = {
        "GB": (_MOVING, moving),
        "second": (_IDLE, idle),
        "byte": (_MANY, memory),
    }
    specs, measure = kinds[case["per"]]
    with regions(case) as shared, run_pairs(specs, shared, measure) as named:
        yield named


@contextlib.contextmanager
def _watched(pair: Pair) -> Iterator[Callable[[], int]]:
    """The growth of both sides' anonymous memory, sampled while the context is open."""
    before, most = _anonymous_bytes(pair), [0]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            most[0] = max(most[0], _anonymous_bytes(pair) - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: most[0]
    finally:
        over.set()
        thread.join()


def _anonymous_bytes(pair: Pair) -> int:
    total = 0
    for pid in pair.pids:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        total += int(found[1]) * 1024 if found else 0
    return total


def ratios(rows: Sequence[Row]) -> list[Ratio]:
    """Theirs over ours, and allowed over used, so that bigger is better."""
    moving = medians(rows, per="GB").values()
    found = [
        figure(
            "CPU seconds per GB of Mooncake, tcp", f"tcp, checks {checks}", round(1 / 0.3, 3),
            [(c.get("Mooncake, tcp"), c.get(f"tcp, checks {checks}")) for c in moving],
        )
        for checks in ("off", "on")
    ]  # fmt: skip
    for path in ("tcp", "shm"):
        idle = [c.get(path) for c in medians(rows, per="second").values()]
        grown = [c.get(path) for c in medians(rows, per="byte").values()]
        # A pair that used less than the clock of processor time can tell used one tick of it.
        tick = 1e-6
        found += [
            figure("0.5 % of a core", f"idle CPU of a connected channel, {path}", 1.0,
                   [(_IDLE_GOAL, None if v is None else max(v, tick)) for v in idle]),
            figure("a quarter of the bytes in flight",
                   f"memory of 1 000 concurrent transfers of 1 MiB, {path}", 1.0,
                   [(_MEMORY_GOAL, None if v is None else max(v, tick)) for v in grown]),
        ]  # fmt: skip
    return found


main = Benchmark(
    "kv_transfer.cpu",
    contenders,
    cases=cases,
    ratios=ratios,
    metric="cost",
    unit="as the case's `per` says",
    repeats=5,
    distributions=(
        "torch", "numpy", "xxhash", "nixl-cu12", "mooncake-transfer-engine-non-cuda", "pyzmq",
    ),
).main  # fmt: skip

if __name__ == "__main__":
    raise SystemExit(main())
