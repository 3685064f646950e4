"""Building and asking a graph of ten thousand devices, beside networkx on the same links.

`path` is asked for random pairs of devices of every kind: `cold` right after the build, `warm`
for other pairs, drawn anew, after five thousand of the same kind were asked; no way is kept. The
slowest of those asks is told too: some of them make a piece of the table that later ones use.
networkx is given the same links and asked for the path of fewest hops, which is less than `path`
answers (no class, no width, and it may lead through other accelerators).
"""

from __future__ import annotations

import functools
import importlib
import math
import random
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sagellm.comm.topology.benchmarks.bench_detection import p95, timed
from sagellm.comm.topology.cluster import ClusterShape, make_cluster
from sagellm.comm.topology.graph import TopologyGraph
from sagellm.comm.topology.placement import rank_map, ring
from sagellm.core.protocols import Device, Link, TopologyInfo
from sagellm.core.protocols.bench import Benchmark, Missing, Ratio, Row

DEVICES = 10_000
PAIRS = 1_000
WARM_ASKS = 5
MEMORY_GB = 0.5
WIDTHS = (50e9, 25e9, 10e9)
GOALS = {
    "build": ("2 s/build", 2.0),
    "path warm, p95": ("1 ms/p95 of warm paths", 1e-3),
    "memory (GB)": ("500 MB/memory of graph and answers", MEMORY_GB),
}

SHAPES = ("cluster", "one switch", "one PCI tree", "torus", "torus of three widths")

Contenders = Mapping[str, Callable[[], float] | Missing]


@functools.cache
def topology(shape: str) -> TopologyInfo:
    """At least ten thousand devices: a cluster, one fabric, a PCI tree, or switches in a torus."""
    if shape == "cluster":
        per_host = len(make_cluster(ClusterShape()).devices)
        return make_cluster(ClusterShape(nodes=-(-DEVICES // per_host)))
    if shape == "one switch":
        devices = [Device(f"g{i}", "gpu") for i in range(DEVICES)]
        links = [Link(d.id, "s", "nvlink", 1, 1e9) for d in devices]
        return TopologyInfo((*devices, Device("s", "fabric_switch")), tuple(links))
    if shape.startswith("torus"):
        return torus(WIDTHS if shape == "torus of three widths" else WIDTHS[:1])
    switches = [Device(f"s{i}", "pci_switch") for i in range(DEVICES // 10)]
    devices = [Device(f"g{i}", "gpu") for i in range(DEVICES - len(switches))]
    links = [Link(f"s{i}", f"s{(i - 1) // 4}", "pcie", 1, 25e9) for i in range(1, len(switches))]
    links += [Link(d.id, f"s{i % len(switches)}", "pcie", 1, 25e9) for i, d in enumerate(devices)]
    return TopologyInfo((*devices, *switches), tuple(links))


def torus(widths: Sequence[float]) -> TopologyInfo:
    """Switches that are each linked to four neighbours, in a square whose edges meet."""
    side = math.isqrt(DEVICES - 1) + 1
    rng = random.Random(0)
    devices = tuple(Device(f"s{x}.{y}", "fabric_switch") for x in range(side) for y in range(side))
    links = tuple(
        Link(f"s{x}.{y}", f"s{a % side}.{b % side}", "nvlink", 1, rng.choice(widths))
        for x in range(side)
        for y in range(side)
        for a, b in ((x + 1, y), (x, y + 1))
    )
    return TopologyInfo(devices, links)


def contenders(case: Mapping[str, Any]) -> Contenders:
    info = topology(case["shape"])
    graph = TopologyGraph(info)
    pairs = random_pairs(info, 0)
    cold = [timed(graph.path, *pair) for pair in pairs]
    slowest = max(
        timed(graph.path, *pair)
        for seed in range(1, WARM_ASKS + 1)
        for pair in random_pairs(info, seed)
    )
    found: dict[str, Callable[[], float] | Missing] = {
        "build": lambda: timed(TopologyGraph, info),
        "path cold, p95": lambda: p95(cold),
        "slowest path until warm": lambda: max(slowest, *cold),
        "path warm, p95": lambda: p95([timed(graph.path, *p) for p in random_pairs(info, 99)]),
        "memory (GB)": lambda: memory_gb(case["shape"]),
    }
    if case["shape"] == "cluster":
        ids = [d.id for d in info.accelerators]
        found["ring of all"] = lambda: timed(ring, graph, ids)
        found["rank_map, TP 8"] = lambda: timed(rank_map, graph, 8, 1, len(ids) // 8, 1)
    return {**found, **peers(info)}


def peers(info: TopologyInfo) -> Contenders:
    try:
        nx: Any = importlib.import_module("networkx")  # Any: it ships no types
    except ImportError:
        why = Missing("pip install networkx")
        return {"networkx build": why, "networkx path, p95": why}

    def fill(into: Any) -> None:  # noqa: ANN401 - as above
        into.add_nodes_from(d.id for d in info.devices)
        into.add_edges_from((x.a, x.b) for x in info.links)

    made = nx.Graph()
    fill(made)

    def hops(a: str, b: str) -> None:
        if nx.has_path(made, a, b):
            nx.bidirectional_shortest_path(made, a, b)

    some = random_pairs(info, 7)[:50]
    return {
        "networkx build": lambda: timed(fill, nx.Graph()),
        "networkx path, p95": lambda: p95([timed(hops, *pair) for pair in some]),
    }


def random_pairs(info: TopologyInfo, seed: int) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    ids = [d.id for d in info.devices]
    return [(rng.choice(ids), rng.choice(ids)) for _ in range(PAIRS)]


@functools.cache
def memory_gb(shape: str) -> float:
    """What a process of its own grows by for the topology, its graph and as many asks as above."""
    code = f"from {__spec__.name} import grown_gb; print(grown_gb({shape!r}, {DEVICES}, {PAIRS}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True
    )
    return float(done.stdout)


def grown_gb(shape: str, devices: int, pairs: int) -> float:
    """Growth of the most memory that this process ever held."""
    global DEVICES, PAIRS
    DEVICES, PAIRS = devices, pairs
    before = most_kib()
    info = topology(shape)
    graph = TopologyGraph(info)
    for seed in range(WARM_ASKS + 1):
        for pair in random_pairs(info, seed):
            graph.path(*pair)
    return (most_kib() - before) * 1024 / 1e9


def most_kib() -> int:
    """The most memory that this process held so far, as Linux tells it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def ratios(rows: Sequence[Row]) -> list[Ratio]:
    found: list[Ratio] = []
    for shape in dict.fromkeys(row.case["shape"] for row in rows):
        same = {row.contender: row for row in rows if row.case["shape"] == shape}
        case = same["build"].case
        for contender, (name, budget) in GOALS.items():
            median = same[contender].median
            found.append(Ratio(name, case, budget / median if median else None, goal=1.0))
        for ours, theirs in (
            ("path warm, p95", "networkx path, p95"),
            ("build", "networkx build"),
        ):
            peer, mine = same[theirs].median, same[ours].median
            value = peer / mine if peer and mine else None
            found.append(Ratio(f"{theirs}/{ours}", case, value))
    return found


main = Benchmark(
    "graph",
    contenders,
    cases=[{"shape": shape} for shape in SHAPES],
    ratios=ratios,
    metric="seconds; GB where named",
    unit="",
    repeats=7,
    warmup=1,
    distributions=("sagellm-comm-topology", "networkx"),
).main

if __name__ == "__main__":
    raise SystemExit(main())
