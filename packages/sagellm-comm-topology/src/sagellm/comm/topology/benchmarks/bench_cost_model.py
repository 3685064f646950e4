"""How true predictions are, and how much is lost by choosing after them.

- `recorded`: published tables of collective measurements (`--curves`' folder, else
  `../shared/data/curves` beside the checkout). Every second size is learned, the others are held
  out. The baseline is one straight line through the same points, fitted to relative errors.
- `choices`: what `select` takes on topologies drawn by chance, against the simulator; and between
  recorded tables, against what they say.
- `live`: a few processes of this machine, every second size learned, on two grids. `powers of two`
  was fixed before anything was measured: 4 KiB to 16 MiB, 7 of 13 learned. `off the pages` was
  chosen after that one had been seen: 25 sizes, 13 learned, beside whole pages. The noise floor is
  by how much the medians of every other repeat differ from those of the rest.
- `plan`: simulating 512 hosts.

Figures are not times: errors, shares, widths. Each is computed once a launch.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from sagellm.comm.topology._cost_curve import Curve
from sagellm.comm.topology.benchmarks.regret import (
    Regret,
    read_curves,
    recorded_regrets,
    simulated_regrets,
)
from sagellm.comm.topology.cluster import ClusterShape, make_cluster
from sagellm.comm.topology.cost_model import CostModel
from sagellm.comm.topology.live import NATIVE, sweep_live
from sagellm.comm.topology.planning import plan
from sagellm.core.protocols import CommError, Estimate
from sagellm.core.protocols.bench import Benchmark, Missing, Ratio, Row

LARGE = 64 << 20
FLOORS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04)
POWERS = "powers of two"
OFF_PAGES = "off the pages"
CURVES_VARIABLE = "SAGELLM_BENCH_CURVES"
_DIRTY = ("noisy", "tcp")  # words in the names of tables whose own notes call them bad runs

Contenders = Mapping[str, Callable[[], float] | Missing]
Point = tuple[int, float, Estimate]
"""A held-out payload, its measured time, and what was predicted."""


def curves_folder() -> Path | None:
    """Where the recorded tables are, or None."""
    named = os.environ.get(CURVES_VARIABLE)
    if named:
        return Path(named)
    for above in Path(__file__).resolve().parents:
        for folder in (above / "shared/data/curves", above.parent / "shared/data/curves"):
            if folder.is_dir():
                return folder
    return None


def held_out(times: Mapping[int, float], size: int) -> list[Point]:
    """Predictions of every second size after learning the others."""
    model = CostModel()
    points = sorted(times.items())
    model.observe(
        [
            {"op": "all_reduce", "algorithm": NATIVE, "group_size": size, "nbytes": n, "time_us": t}
            for n, t in points[::2]
        ]
    )
    return [(n, t, model.predict("all_reduce", n, size, NATIVE)) for n, t in points[1::2]]


def left_out(tables: Mapping[str, Mapping[int, float]]) -> list[Point]:
    """Predictions for each table with the interval's floor chosen on all the others."""
    found: list[Point] = []
    by_floor = {
        floor: {name: with_floor(times, floor) for name, times in tables.items()}
        for floor in FLOORS
    }
    for name in tables:
        for floor in FLOORS:  # the least that covers 95 % of the others
            others = [p for k, points in by_floor[floor].items() if k != name for p in points]
            if sum(map(inside, others)) >= 0.95 * len(others):
                break
        found += by_floor[floor][name]
    return found


def with_floor(times: Mapping[int, float], floor: float) -> list[Point]:
    points = sorted(times.items())
    curve = Curve(points[::2], floor=floor)
    return [(n, t, Estimate(*(r := curve.read(n))[:3], None, r[3])) for n, t in points[1::2]]


def straight_line_error(times: Mapping[int, float]) -> list[float]:
    """Relative errors, at the sizes held out, of alpha-beta fitted to those learned."""
    points = sorted(times.items())
    # Least squares of (a + b x - t) / t: the normal equations of two unknowns.
    weighed = [(1 / t, x / t) for x, t in points[::2]]
    aa, ab, bb = (sum(u[i] * u[j] for u in weighed) for i, j in ((0, 0), (0, 1), (1, 1)))
    a, b = sum(u[0] for u in weighed), sum(u[1] for u in weighed)
    determinant = aa * bb - ab * ab
    alpha, beta = (a * bb - b * ab) / determinant, (b * aa - a * ab) / determinant
    return [abs((alpha + beta * x) / t - 1) for x, t in points[1::2]]


@functools.cache
def recorded() -> Mapping[str, float]:
    folder = curves_folder()
    assert folder is not None
    clean: list[Point] = []
    tables: dict[str, Mapping[int, float]] = {}
    bad_widths: list[float] = []
    line: list[float] = []
    worst: list[float] = []
    for name, (_, ranks, times) in read_curves(folder).items():
        points = held_out(times, ranks)
        if any(word in name for word in _DIRTY):
            bad_widths.append(median(width(p) for p in points))
            continue
        clean += points
        tables[name] = times
        line += straight_line_error(times)
        worst.append(median(error(p) for p in points))
    blind = left_out(tables)
    large = [error(p) for p in clean if p[0] >= LARGE]
    return {
        "within 5 % of 64 MiB and more, share": sum(e <= 0.05 for e in large) / len(large),
        "error of all sizes, median": median(error(p) for p in clean),
        "error of the worst table, median": max(worst),
        "straight line: error of all sizes, median": median(line),
        "held-out points in the interval, share": sum(inside(p) for p in clean) / len(clean),
        "interval of clean tables, median width": median(width(p) for p in clean),
        "table left out: in the interval, share": sum(map(inside, blind)) / len(blind),
        "table left out: median width": median(map(width, blind)),
        "interval of the narrowest bad table, median width": min(bad_widths),
    }


def error(point: Point) -> float:
    return abs(point[2].time_us / point[1] - 1)


def inside(point: Point) -> bool:
    return point[2].low_us <= point[1] <= point[2].high_us


def width(point: Point) -> float:
    return (point[2].high_us - point[2].low_us) / point[2].time_us


def share(regrets: Sequence[Regret]) -> float:
    return sum(r.regret <= 0.05 for r in regrets) / len(regrets)


@functools.cache
def choices(topologies: int) -> Mapping[str, float]:
    seeds = range(topologies)
    measured = [r for s in seeds for r in simulated_regrets(s, calibrated=True)]
    formula = [r for s in seeds for r in simulated_regrets(s, calibrated=False)]
    found = {
        "after six sizes were measured, share within 5 %": share(measured),
        "by formula alone, share within 5 %": share(formula),
        "a random algorithm, share within 5 %": sum(r.chance for r in formula) / len(formula),
    }
    folder = curves_folder()
    if folder is not None:
        between = recorded_regrets(read_curves(folder))
        found["between recorded tables, share within 5 %"] = share(between)
        found["between recorded tables by chance, share within 5 %"] = sum(
            r.chance for r in between
        ) / len(between)
        found["between recorded tables, choices"] = len(between)
    return found


def grid(name: str) -> list[int]:
    """Payloads of a live case, rising; every second is learned, the first and the last too."""
    if name == POWERS:
        return [4096 << k for k in range(13)]
    # Off the powers of two by up to 12 %: on whole pages buffers fall upon each other in the
    # caches, so that neighbouring sizes may be of different kinds.
    return [round(4096 * 2 ** (k / 2) * (1 + 0.12 * (0.618 * k % 1))) // 64 * 64 for k in range(25)]


@functools.cache
def live(backend: str, ranks: int, rounds: int, sizes: tuple[int, ...]) -> Mapping[str, float]:
    rows = sweep_live(backend, ranks, sizes, repeats=rounds, timeout_s=400)
    times: dict[int, list[float]] = {}
    for row in rows:
        times.setdefault(row["nbytes"], []).append(row["time_us"])
    model = CostModel()
    model.observe([r for r in rows if sizes.index(r["nbytes"]) % 2 == 0])
    errors, halves, hits = [], [], []
    for n in sizes[1::2]:
        middle, found = median(times[n]), model.predict("all_reduce", n, ranks, NATIVE)
        errors.append(abs(found.time_us / middle - 1))
        halves.append(abs(median(times[n][::2]) - median(times[n][1::2])) / middle)
        hits += [found.low_us <= t <= found.high_us for t in times[n]]
    return {
        "error, median": median(errors),
        "half-split of repeats, median": median(halves),
        "fresh repeats in the interval, share": sum(hits) / len(hits),
    }


@functools.cache
def plan_s(nodes: int) -> float:
    info = make_cluster(ClusterShape(nodes=nodes))
    start_s = time.perf_counter()
    plan(info, "all_reduce", 256 << 20)
    return time.perf_counter() - start_s


def contenders(case: Mapping[str, Any]) -> Contenders:
    what = case["what"]
    if what == "recorded":
        if curves_folder() is None:
            return {"predictions": Missing(f"no recorded tables; {CURVES_VARIABLE} names them")}
        return figures(recorded)
    if what == "choices":
        return figures(lambda: choices(case["topologies"]))
    if what == "plan":
        return {"plan, s": lambda: plan_s(case["nodes"])}
    try:
        sizes = tuple(grid(case["grid"]))
        return figures(lambda: live(case["backend"], case["ranks"], case["rounds"], sizes))
    except CommError as e:
        return {"error, median": Missing(str(e)), "half-split of repeats, median": Missing(str(e))}


def figures(compute: Callable[[], Mapping[str, float]]) -> Contenders:
    """A contender for each figure; they are computed now, so that they are known by name."""
    return {name: functools.partial(float, value) for name, value in compute().items()}


GOALS: Mapping[str, tuple[str, float, bool]] = {
    "within 5 % of 64 MiB and more, share": ("share of large within 5 %/93 %", 0.93, True),
    "error of all sizes, median": ("3 %/median error of all sizes", 0.03, False),
    "held-out points in the interval, share": ("share inside the interval/90 %", 0.90, True),
    "interval of clean tables, median width": ("20 %/median width of intervals", 0.20, False),
    "table left out: in the interval, share": ("share inside, table left out/90 %", 0.90, True),
    "table left out: median width": ("20 %/median width, table left out", 0.20, False),
    "after six sizes were measured, share within 5 %": (
        "choices within 5 % after measuring/95 %", 0.95, True,
    ),
    "by formula alone, share within 5 %": ("choices within 5 % by formula/95 %", 0.95, True),
    "between recorded tables, share within 5 %": (
        "choices within 5 % between recorded tables/95 %", 0.95, True,
    ),
    "plan, s": ("60 s/plan", 60.0, False),
}  # fmt: skip


CHANCES = (
    (
        "after six sizes were measured, share within 5 %",
        "a random algorithm, share within 5 %",
        "bad choices by chance/after measuring",
    ),
    (
        "between recorded tables, share within 5 %",
        "between recorded tables by chance, share within 5 %",
        "bad choices by chance/between recorded tables",
    ),
)
"""Figure, what luck would reach, and the name of the ratio of what they miss."""


def ratios(rows: Sequence[Row]) -> list[Ratio]:
    found: list[Ratio] = []
    for case in {tuple(row.case.items()): row.case for row in rows}.values():
        value = {r.contender: r.median for r in rows if r.case == case}
        for name, (title, goal, more_is_better) in GOALS.items():
            figure = value.get(name)
            if figure is not None:
                ratio = figure / goal if more_is_better else goal / max(figure, 1e-9)
                found.append(Ratio(title, case, ratio, goal=1.0))
        bad = value.get("interval of the narrowest bad table, median width")
        clean = value.get("interval of clean tables, median width")
        if bad and clean:
            found.append(Ratio("width of bad tables/of clean ones", case, bad / clean, goal=3.0))
        line, ours = (
            value.get(n)
            for n in ("straight line: error of all sizes, median", "error of all sizes, median")
        )
        if line and ours:
            found.append(Ratio("error of a straight line/ours", case, line / ours, goal=1.0))
        for choice, chance, title in CHANCES:
            good, luck = value.get(choice), value.get(chance)
            if good is not None and luck is not None:
                found.append(Ratio(title, case, (1 - luck) / max(1 - good, 1e-3), goal=1.0))
        if case["what"] == "live":
            off, floor = (value.get(n) for n in ("error, median", "half-split of repeats, median"))
            allowed = None if floor is None else max(0.05, floor)
            ratio_live = (
                allowed / max(off, 1e-9) if allowed is not None and off is not None else None
            )
            title = f"5 % or half-split/median error, {case['grid']}"
            found.append(Ratio(title, case, ratio_live, goal=1.0))
    return found


def cases(quick: bool) -> list[dict[str, Any]]:  # Any: plain JSON values
    rounds = 12 if quick else 24
    every = [(backend, n) for backend in ("gloo", "shm") for n in (2, 3, 4)]
    lives = [("gloo", 2)] if quick else every
    return [
        {"what": "recorded"},
        {"what": "choices", "topologies": 100 if quick else 1000},
        *(
            {"what": "live", "backend": b, "ranks": n, "rounds": rounds, "grid": name}
            for b, n in lives
            for name in (POWERS, OFF_PAGES)
        ),
        {"what": "plan", "nodes": 64 if quick else 512},
    ]


main = Benchmark(
    "cost_model",
    contenders,
    cases=cases,
    ratios=ratios,
    metric="figure by name: errors, shares and widths",
    unit="",
    repeats=5,
    warmup=0,
    distributions=("sagellm-comm-topology", "sagellm-comm-collective-ops", "torch"),
).main

if __name__ == "__main__":
    raise SystemExit(main())
