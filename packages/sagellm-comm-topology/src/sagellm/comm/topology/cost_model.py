"""How long collectives take here, and what each figure rests on.

Before anything is measured, alpha-beta-gamma formulas over the topology's links give a `prior`.
Measured curves replace it point by point: within them an estimate is `calibrated`; beyond them, or
for a group size never measured, it is `scaled`, with an interval that says so.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from sagellm.core.protocols import (
    Basis,
    ConfigError,
    CostModelProtocol,
    CostTable,
    Estimate,
    TopologyInfo,
)

from . import _cost_load
from ._cost_curve import Curve, Reading
from ._cost_prior import ALGORITHMS, LinkCost, busbw_factor, check, link_cost, prior_us
from .graph import TopologyGraph

__all__ = ["CostModel", "Drift"]

_Key = tuple[str, str, int]

_VERSION = 1
_PRIOR = "prior:"  # marks the op of a curve that is a formula's line, not a measurement
_PRIOR_SPREAD = math.log(4.0)
_SCALED_SPREAD = math.log(2.0)
_KEPT_REPEATS = 64
_DRIFT_SAMPLES = 5
_LINE = (1, 1 << 30)  # two payloads fix a formula's straight line
_FROZEN_SIZES = (*range(2, 17), 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True, slots=True)
class Drift:
    """A measured curve that the machine no longer follows.

    Attributes:
        op: Operation.
        algorithm: Algorithm.
        group_size: Ranks.
        ratio: Measured over predicted time, the median of the samples.
        samples: Measurements that were compared.

    """

    op: str
    algorithm: str
    group_size: int
    ratio: float
    samples: int


class CostModel(CostModelProtocol):
    """Predicts how long collectives take on a topology. Thread-safe.

    Args:
        topology: Whose links the prior uses; None, or a topology without accelerators, gives the
            prior of processes of one host.

    """

    def __init__(self, topology: TopologyInfo | None = None) -> None:
        self._topology = topology or TopologyInfo()
        self._graph = TopologyGraph(self._topology)
        self._lock = threading.Lock()
        self._repeats: dict[_Key, dict[int, list[float]]] = {}
        self._curves: dict[_Key, Curve] = {}
        self._lines: dict[tuple[str, str, tuple[str, ...]], tuple[float, float]] = {}
        self._links: dict[tuple[str, ...], tuple[LinkCost, tuple[int, LinkCost]]] = {}

    def predict(self, op: str, nbytes: int, group: Sequence[str] | int, algorithm: str) -> Estimate:
        """Time of one call.

        Args:
            op: `all_reduce`, `all_gather`, `reduce_scatter`, `broadcast`, `all_to_all`, `p2p`.
            nbytes: Payload per rank as nccl-tests count it.
            group: Device ids of the members, or just their number.
            algorithm: `ring`, `tree`, `recursive_doubling`, `halving_doubling`, `hierarchical`,
                `direct`; not every op has every one.

        Raises:
            ConfigError: Unknown op, algorithm or device, or a size out of range; the message
                lists the known ones.

        """
        check(op, algorithm, self.algorithms(op))
        size = _size(group, nbytes)
        curve = self._curves.get((op, algorithm, size))
        if curve is not None and size > 1:
            return _estimate(op, nbytes, size, curve.read(nbytes))
        if algorithm not in ALGORITHMS[op]:
            return _estimate(op, nbytes, size, self._stretched(op, algorithm, nbytes, size))
        prior = self._prior(op, algorithm, nbytes, group)
        return _estimate(op, nbytes, size, self._scaled(op, algorithm, nbytes, size, prior))

    def algorithms(self, op: str) -> tuple[str, ...]:
        """Names that `predict` knows for an operation: those with a formula and those measured.

        Raises:
            ConfigError: Unknown op; the message lists the known ones.

        """
        check(op, ALGORITHMS.get(op, ("",))[0])
        return tuple(sorted({*ALGORITHMS[op], *(k[1] for k in self._curves if k[0] == op)}))

    def observe(self, samples: Sequence[Mapping[str, Any]]) -> None:  # Any: JSON-like rows
        """Learn from measurements: rows of op, nbytes, group_size, algorithm, time_us.

        An algorithm without a formula (a backend's own, such as `one_shot`) is known by its
        measurements alone. The median of the repeats of one size counts, the latest 64 of them.
        All rows are checked before one is taken.

        Raises:
            ConfigError: A row lacks a field or has an impossible value; nothing was learned.

        """
        rows = [_row(i, sample) for i, sample in enumerate(samples)]
        with self._lock:
            touched = set()
            for key, nbytes, time_us in rows:
                times = self._repeats.setdefault(key, {}).setdefault(nbytes, [])
                times.append(time_us)
                del times[:-_KEPT_REPEATS]
                touched.add(key)
            fresh = dict(self._curves)
            for key in touched:
                knots = sorted(self._repeats[key].items())
                fresh[key] = Curve(
                    [(nbytes, median(times)) for nbytes, times in knots],
                    [_spread(times) for _, times in knots],
                )
            self._curves = fresh

    def drift(self, samples: Sequence[Mapping[str, Any]]) -> tuple[Drift, ...]:  # Any: as above
        """Curves that fresh measurements contradict; learns nothing from them.

        A curve has drifted when, of at least five samples within its sizes, more than half lie
        outside of their intervals on the same side. `forget` it and calibrate anew.

        Args:
            samples: Rows as for `observe`.

        Raises:
            ConfigError: A row lacks a field or has an impossible value.

        """
        seen: dict[_Key, list[tuple[float, int]]] = {}
        for key, nbytes, time_us in [_row(i, sample) for i, sample in enumerate(samples)]:
            curve = self._curves.get(key)
            if curve is None:
                continue
            expected, low, high, basis = curve.read(nbytes)
            if basis == "calibrated":
                side = (time_us > high) - (time_us < low)
                seen.setdefault(key, []).append((time_us / expected, side))
        found = []
        for key, compared in sorted(seen.items()):
            sides = [side for _, side in compared]
            worst = max(sides.count(1), sides.count(-1))
            if len(compared) >= _DRIFT_SAMPLES and 2 * worst > len(compared):
                found.append(Drift(*key, median(ratio for ratio, _ in compared), len(compared)))
        return tuple(found)

    def forget(self, op: str, algorithm: str, group_size: int) -> None:
        """Drop what was measured of one curve; a curve that is not there is no error."""
        key = (op, algorithm, group_size)
        with self._lock:
            self._repeats.pop(key, None)
            self._curves = {k: curve for k, curve in self._curves.items() if k != key}

    def save(self, library: str, folder: Path | None = None) -> Path:
        """Keep what was measured, for this topology and library version; the file's path.

        Args:
            library: Name and version of what ran the collectives: `gloo torch-2.6`.
            folder: Where; None is the user's cache folder.

        Raises:
            OSError: The folder cannot be written.

        """
        from ._cost_profile import default_folder, save_rows  # msgspec, at the first use only

        with self._lock:
            rows = [
                {"op": op, "algorithm": algorithm, "group_size": size, "nbytes": n, "time_us": t}
                for (op, algorithm, size), knots in self._repeats.items()
                for n, times in knots.items()
                for t in times
            ]
        return save_rows(folder or default_folder(), self._topology.fingerprint, library, rows)

    def load(self, library: str, folder: Path | None = None) -> int:
        """Learn what `save` kept for this topology and library version; how many rows.

        Measurements of another topology or version are left where they are.

        Raises:
            ConfigError: The file is no profile; the message names it.

        """
        from ._cost_profile import default_folder, load_rows

        rows = load_rows(folder or default_folder(), self._topology.fingerprint, library)
        self.observe(rows)
        return len(rows)

    def freeze(self) -> CostTable:
        """The model as data, to be broadcast from rank 0 before anybody chooses by it.

        Measured curves keep their op's name. Formulas are in it as lines of two points under
        `prior:<op>`, for the group sizes of this topology.
        """
        with self._lock:
            measured = dict(self._curves)
        curves: dict[_Key, tuple[tuple[int, float], ...]] = {
            key: curve.points for key, curve in measured.items()
        }
        for size in sorted({*_FROZEN_SIZES, *(k[2] for k in measured if k[2] > 1)}):
            for op, algorithms in ALGORITHMS.items():
                for algorithm in algorithms:
                    line = tuple((x, self._prior(op, algorithm, x, size)) for x in _LINE)
                    curves[f"{_PRIOR}{op}", algorithm, size] = line
        return CostTable(self._topology.fingerprint, _VERSION, curves)

    def select(
        self, table: CostTable, op: str, nbytes: int, group: Sequence[str] | int
    ) -> tuple[str, Estimate]:
        """The fastest algorithm and its estimate. Pure: equal tables give equal answers.

        Formulas are first scaled to what was measured of the other algorithms, so that an
        optimistic formula does not beat a measurement; where only algorithms without a formula
        were measured, no formula takes part. Ties go to the first name.

        Raises:
            ConfigError: The table has nothing for the op, or is of another version.

        """
        if table.version != _VERSION:
            raise ConfigError(f"cost table of version {table.version}, this reads {_VERSION}")
        size = _size(group, nbytes)
        known = sorted({k[2] for k in table.curves if k[0] in (op, f"{_PRIOR}{op}")})
        if not known:
            ops = sorted({k[0].removeprefix(_PRIOR) for k in table.curves})
            raise ConfigError(f"the cost table has no {op!r}; it has {', '.join(ops) or 'nothing'}")
        if size == 1:
            return min(k[1] for k in table.curves), _estimate(
                op, nbytes, 1, (0.0, 0.0, 0.0, "prior")
            )
        near = _nearest(known, size)
        readings = _readings(table, op, nbytes, near)
        if near != size:
            readings = {a: _stretched(r, near, size) for a, r in readings.items()}
        best = min(readings, key=lambda a: (readings[a][0], a))
        return best, _estimate(op, nbytes, size, readings[best])

    def _prior(self, op: str, algorithm: str, nbytes: int, group: Sequence[str] | int) -> float:
        members = self._members(group)
        size = _size(group, nbytes)
        if 2 <= size == len(members) <= _cost_load.MOST_RANKS:
            key = (op, algorithm, members)
            if key not in self._lines:
                self._lines[key] = _cost_load.line(self._graph, members, op, algorithm)
            fixed, per_byte = self._lines[key]
            return fixed + per_byte * nbytes
        if members not in self._links:
            self._links[members] = self._slowest(members)
        link, local = self._links[members]
        return prior_us(op, algorithm, nbytes, size, link, local=local)

    def _members(self, group: Sequence[str] | int) -> tuple[str, ...]:
        if isinstance(group, int):
            return tuple(d.id for d in self._topology.accelerators[:group])
        return tuple(self._graph.device(name).id for name in group)

    def _slowest(self, members: tuple[str, ...]) -> tuple[LinkCost, tuple[int, LinkCost]]:
        """The group's slowest link, ranks per host, and the slowest link within a host."""
        if len(members) < 2:
            alone = link_cost("SYS")
            return alone, (max(1, len(members)), alone)
        hosts: dict[int, list[str]] = {}
        for name in members:
            hosts.setdefault(self._graph.device(name).node, []).append(name)
        firsts = [names[0] for names in hosts.values()]
        inner = [p for names in hosts.values() for p in pairwise(names)]
        outer = list(pairwise(firsts))
        local = self._worst(inner) if inner else link_cost("LOC")
        return self._worst(outer or inner), (max(len(n) for n in hosts.values()), local)

    def _worst(self, pairs: Sequence[tuple[str, str]]) -> LinkCost:
        paths = [self._graph.path(a, b) for a, b in pairs]
        costs = [link_cost(p.kind, p.bottleneck_bytes_per_s) for p in paths]
        return max(costs, key=lambda c: (1 / c.bytes_per_s, c.alpha_us))

    def _scaled(self, op: str, algorithm: str, nbytes: int, size: int, prior: float) -> Reading:
        """The prior, times what measurements of the nearest group size say of their own prior."""
        same = [k for k in self._curves if k[0] == op and k[1] == algorithm and k[2] > 1]
        if not same or size == 1 or prior <= 0:
            low, high = prior * math.exp(-_PRIOR_SPREAD), prior * math.exp(_PRIOR_SPREAD)
            return prior, low, high, "prior"
        near = _nearest((k[2] for k in same), size)
        measured = self._curves[op, algorithm, near].read(nbytes)
        time = prior * measured[0] / self._prior(op, algorithm, nbytes, near)
        width = _SCALED_SPREAD * (1 + abs(math.log2(near / size)))
        return time, time * math.exp(-width), time * math.exp(width), "scaled"

    def _stretched(self, op: str, algorithm: str, nbytes: int, size: int) -> Reading:
        """What was measured of the nearest group size; nothing tells how it grows with ranks."""
        if size == 1:
            return 0.0, 0.0, 0.0, "prior"
        near = _nearest((k[2] for k in self._curves if k[:2] == (op, algorithm)), size)
        return _stretched(self._curves[op, algorithm, near].read(nbytes), near, size)


def _nearest(sizes: Iterable[int], size: int) -> int:
    return min(sizes, key=lambda n: (abs(math.log(n / size)), n))


def _readings(table: CostTable, op: str, nbytes: int, size: int) -> dict[str, Reading]:
    lines = {
        algorithm: _on_line(points, nbytes)
        for (name, algorithm, n), points in table.curves.items()
        if name == f"{_PRIOR}{op}" and n == size
    }
    found: dict[str, Reading] = {
        algorithm: Curve(points).read(nbytes)
        for (name, algorithm, n), points in table.curves.items()
        if name == op and n == size
    }
    ratios = [found[a][0] / lines[a] for a in found if lines.get(a, 0.0) > 0]
    if found and not ratios:  # what was measured has no formula: others compare with nothing
        return found
    ratio = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else 1.0
    width = _SCALED_SPREAD if ratios else _PRIOR_SPREAD
    basis: Basis = "scaled" if ratios else "prior"
    for algorithm, line in lines.items():
        time = line * ratio
        found.setdefault(algorithm, (time, time * math.exp(-width), time * math.exp(width), basis))
    return found


def _on_line(points: Sequence[tuple[int, float]], nbytes: int) -> float:
    (x0, t0), (x1, t1) = points[0], points[-1]
    return t0 + (t1 - t0) / (x1 - x0) * (nbytes - x0)


def _stretched(reading: Reading, near: int, size: int) -> Reading:
    """A reading of another group size: the same order of algorithms, a wider interval."""
    time, low, high, basis = reading
    wide = math.exp(abs(math.log(size / near)))
    return time, low / wide, high * wide, "scaled" if basis == "calibrated" else basis


def _estimate(op: str, nbytes: int, size: int, reading: Reading) -> Estimate:
    time, low, high, basis = reading
    busbw = None
    if nbytes > 0 and time > 0:
        busbw = nbytes / (time / 1e6) * busbw_factor(op, size)
    return Estimate(time, low, high, busbw, basis)


def _size(group: Sequence[str] | int, nbytes: int) -> int:
    size = group if isinstance(group, int) else len(group)
    if size < 1:
        raise ConfigError(f"a group has at least 1 member, not {size}")
    if nbytes < 0:
        raise ConfigError(f"nbytes must be at least 0, not {nbytes}")
    return size


def _spread(times: Sequence[float]) -> float:
    """Half of the range that the middle half of the repeats covers, over their median."""
    if len(times) < 3:
        return 0.0
    ordered = sorted(times)
    quarter = len(ordered) // 4
    return (ordered[-1 - quarter] - ordered[quarter]) / (2 * median(ordered))


def _row(index: int, sample: Mapping[str, Any]) -> tuple[_Key, int, float]:
    try:
        op, algorithm = str(sample["op"]), str(sample["algorithm"])
        nbytes, size = int(sample["nbytes"]), int(sample["group_size"])
        time_us = float(sample["time_us"])
    except (KeyError, TypeError, ValueError) as e:
        raise ConfigError(
            f"sample {index} needs op, nbytes, group_size, algorithm and time_us: {e!r}"
        ) from None
    check(op, algorithm, (algorithm,))
    if nbytes < 1 or size < 1 or not (0 < time_us < math.inf):
        raise ConfigError(
            f"sample {index}: nbytes {nbytes} and group_size {size} must be at least 1, "
            f"time_us {time_us} above 0"
        )
    return (op, algorithm, size), nbytes, time_us
