"""How much slower what `select` takes is than the best, where the truth is known.

Two truths: the simulator's on topologies drawn by chance, and recorded curves of machines, between
which `select` is asked to choose as if they were algorithms.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from sagellm.comm.topology._sim_schedules import SCHEDULES, schedule
from sagellm.comm.topology.benchmarks.random_topology import random_topology
from sagellm.comm.topology.cost_model import CostModel
from sagellm.comm.topology.graph import TopologyGraph
from sagellm.comm.topology.simulator import Network, simulate
from sagellm.core.protocols import TopologyInfo

__all__ = ["Curves", "Regret", "read_curves", "recorded_regrets", "simulated_regrets"]

MEASURED = (4 << 10, 64 << 10, 1 << 20, 8 << 20, 64 << 20, 512 << 20)
HELD_OUT = (16 << 10, 256 << 10, 3 << 20, 24 << 20, 192 << 20)
_NOISE = 0.03
_OPS = ("all_reduce", "all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all")

Curves = Mapping[str, tuple[str, int, dict[int, float]]]
"""Name of a recorded table to its op, ranks and microseconds by size."""


@dataclass(frozen=True, slots=True)
class Regret:
    """One choice.

    Attributes:
        seed: Of the topology, or the number of the pair of curves.
        op: Operation.
        nbytes: Payload, one that was not measured.
        chosen: What `select` took.
        best: What is fastest in truth.
        regret: Time of the chosen over that of the best, less 1.
        chance: Share of the algorithms whose regret is at most 5 %: what luck would do.

    """

    seed: int
    op: str
    nbytes: int
    chosen: str
    best: str
    regret: float
    chance: float


def simulated_regrets(seed: int, *, calibrated: bool) -> list[Regret]:
    """Choices on one random topology, after six sizes were measured on it or after none.

    Measurements are five repeats that differ by some 3 %, as those of machines do.
    """
    info = random_topology(seed)
    op = random.Random(f"op {seed}").choice(_OPS)
    group = [d.id for d in info.accelerators]
    truth = _truth(info, group, op, (*MEASURED, *HELD_OUT) if calibrated else HELD_OUT)
    model = CostModel(info)
    if calibrated:
        noise = random.Random(f"noise {seed}")
        model.observe(
            [
                {"op": op, "algorithm": a, "group_size": len(group), "nbytes": n,
                 "time_us": t * noise.lognormvariate(0, _NOISE)}
                for (a, n), t in truth.items()
                if n in MEASURED
                for _ in range(5)
            ]
        )  # fmt: skip
    table = model.freeze()
    found = []
    for nbytes in HELD_OUT:
        times = {a: t for (a, n), t in truth.items() if n == nbytes}
        chosen, _ = model.select(table, op, nbytes, len(group))
        found.append(_regret(seed, op, nbytes, chosen, times))
    return found


def _regret(seed: int, op: str, nbytes: int, chosen: str, times: Mapping[str, float]) -> Regret:
    best = min(times, key=lambda a: (times[a], a))
    chance = sum(t <= 1.05 * times[best] for t in times.values()) / len(times)
    return Regret(seed, op, nbytes, chosen, best, times[chosen] / times[best] - 1, chance)


def _truth(
    info: TopologyInfo, group: Sequence[str], op: str, sizes: Sequence[int]
) -> dict[tuple[str, int], float]:
    network = Network(TopologyGraph(info), group)
    hosts: dict[int, list[int]] = {}
    for rank in range(len(group)):
        hosts.setdefault(network.host_of(rank), []).append(rank)
    ranks = list(hosts.values())
    return {
        (algorithm, nbytes): simulate(network, schedule(op, algorithm, nbytes, ranks)).time_us
        for algorithm in SCHEDULES[op]
        for nbytes in sizes
    }


def read_curves(folder: Path) -> Curves:
    """Recorded tables of a folder that hold times by size, the out-of-place ones."""
    found: dict[str, tuple[str, int, dict[int, float]]] = {}
    for path in sorted(folder.glob("*.csv")):
        lines = path.read_text(encoding="utf-8").splitlines()
        notes = " ".join(line for line in lines if line.startswith("#"))
        rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
        if "size_bytes" not in rows[0]:
            continue
        op = notes.split("collective:")[1].split()[0]
        ranks = int(notes.split("ranks:")[1].split()[0])
        times = {int(r["size_bytes"]): float(r["time_us"]) for r in rows}
        found[path.stem] = (op, ranks, times)
    return found


def recorded_regrets(curves: Curves) -> list[Regret]:
    """Choices between every two curves of one op and number of ranks, at sizes both held out."""
    stand_ins = ("ring", "direct")
    found = []
    for number, (a, b) in enumerate(combinations(sorted(curves), 2)):
        (op, ranks, _), (other_op, other_ranks, _) = curves[a], curves[b]
        common = sorted(curves[a][2].keys() & curves[b][2].keys())
        if (op, ranks) != (other_op, other_ranks) or len(common) < 3:
            continue
        model = CostModel()
        for name, stand_in in zip((a, b), stand_ins, strict=True):
            model.observe(
                [
                    {"op": op, "algorithm": stand_in, "group_size": ranks, "nbytes": n,
                     "time_us": curves[name][2][n]}
                    for n in common[::2]
                ]
            )  # fmt: skip
        table = model.freeze()
        only = {k: v for k, v in table.curves.items() if k[0] == op}
        for nbytes in common[1::2]:
            chosen, _ = model.select(type(table)("", table.version, only), op, nbytes, ranks)
            times = {s: curves[n][2][nbytes] for s, n in zip(stand_ins, (a, b), strict=True)}
            found.append(_regret(number, op, nbytes, chosen, times))
    return found
