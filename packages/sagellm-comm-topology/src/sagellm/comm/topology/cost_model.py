"""How long collectives take here, and what each figure rests on.

Before anything is measured, alpha-beta-gamma formulas over the topology's links give a `prior`.
Measured curves replace it point by point: within them an estimate is `calibrated`; beyond them, or
for a group never measured, it is `scaled`, with an interval that says so. A group is told by its
size and its shape (how its members are joined), not by their names.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Generic, TypeVar

from sagellm.core.protocols import (
    ConfigError,
    CostModelProtocol,
    CostTable,
    Estimate,
    TopologyInfo,
)

from . import _cost_load
from ._cost_curve import Curve
from ._cost_kept import Kept
from ._cost_lookup import (
    MARK_NOISE,
    MARK_PRIOR,
    MARK_SHAPE,
    Formula,
    Knowledge,
    estimate,
    on_line,
    pick,
    table_names,
)
from ._cost_prior import ALGORITHMS, LinkCost, check, check_op, link_cost, prior_us
from ._cost_rows import CurveKey, Sample, group_of, library_name, payload, sample_of
from ._cost_shape import shape_of
from .graph import TopologyGraph

__all__ = ["CostModel", "Drift"]

_Line = tuple[tuple[int, float], ...]
_K = TypeVar("_K")
_V = TypeVar("_V")

_VERSION = 1
_DRIFT_SAMPLES = 5
_LINE = (1, 1 << 30)  # two payloads fix a formula's straight line
_FROZEN_SIZES = (*range(2, 17), 32, 64, 128, 256, 512, 1024)
_REMEMBERED = 1024  # answers of each kind
_WAYS = _cost_load.MOST_RANKS**2  # those of one group at the least
_UNTOLD = "?"  # shape of named devices in a table that tells no shapes


@dataclass(frozen=True, slots=True)
class Drift:
    """A measured curve that the machine no longer follows.

    Attributes:
        op: Operation.
        algorithm: Algorithm.
        group_size: Ranks.
        shape: How they are joined, as `CostModel.shape` says; empty where it was not told.
        ratio: Measured over predicted time, the median of the samples.
        samples: Measurements that were compared.

    """

    op: str
    algorithm: str
    group_size: int
    shape: str
    ratio: float
    samples: int


class CostModel(CostModelProtocol):
    """Predicts how long collectives take on a topology. Thread-safe.

    Kept are the latest 32 repeats of at most 128 sizes of at most 512 curves: beyond them the
    sizes that lie closest between two others go, and the curves that were not observed longest.

    Args:
        topology: Whose links the prior uses; None, or a topology without accelerators, gives the
            prior of processes of one host.

    """

    def __init__(self, topology: TopologyInfo | None = None) -> None:
        self._topology = topology or TopologyInfo()
        self._graph = TopologyGraph(self._topology)
        self._lock = threading.Lock()
        self._kept = Kept()
        self._lines: _Memory[tuple[str, str, tuple[str, ...]], tuple[float, float]] = _Memory()
        self._ways: _Memory[tuple[str, str], _cost_load.Way] = _Memory(_WAYS)
        self._links: _Memory[tuple[str, ...], tuple[LinkCost, tuple[int, LinkCost]]] = _Memory()
        self._shapes: _Memory[tuple[str, ...], str] = _Memory()

    def predict(self, op: str, nbytes: int, group: Sequence[str] | int, algorithm: str) -> Estimate:
        """Time of one call.

        Named devices are answered by what was measured of a group of their shape. A number is
        answered by what was measured without names; by formula it stands for the topology's first
        accelerators, and where it is all of them, it stands for them. The formula of an algorithm
        never measured is scaled to what was measured of the op's others, as by `select`. A group
        of one takes no time, `prior`; no bytes take as long as a call does, without a bandwidth.

        Args:
            op: `all_reduce`, `all_gather`, `reduce_scatter`, `broadcast`, `all_to_all`, `p2p`.
            nbytes: Payload per rank as nccl-tests count it, from 0 to 2**50.
            group: Device ids of the members, each once, or just their number, to 2**20.
            algorithm: `ring`, `tree`, `recursive_doubling`, `halving_doubling`, `hierarchical`,
                `direct`; not every op has every one.

        Raises:
            ConfigError: Unknown op, algorithm or device, a payload or group that cannot be (no
                whole number, NaN, below 0, an empty group); the message lists the known ones.

        """
        curves, members = self._measured()
        algorithms = _names(op, curves)
        check(op, algorithm, algorithms)
        nbytes = payload(nbytes)
        size, names = self._group(group)
        if size == 1:
            return estimate(op, nbytes, 1, (0.0, 0.0, 0.0, "prior"))
        shape = self.shape(names)
        known = Knowledge(curves, self._formula({shape: names, **members}))
        found = known.reading(op, algorithm, nbytes, size, shape)
        if found is None:
            found = known.readings(algorithms, op, nbytes, size, shape)[algorithm]
        return estimate(op, nbytes, size, found)

    def shape(self, group: Sequence[str] | int) -> str:
        """How the members are joined, in words; equal for groups that share their measurements.

        Hosts, ranks on each, kinds and models of devices, and how many pairs have which path class
        and bottleneck. Neither names nor order matter. Empty for a number and for one device.

        Raises:
            ConfigError: A device is unknown or there twice.

        """
        if not group:
            return ""
        names = self._group(group)[1]
        if len(names) < 2:
            return ""
        return self._shapes.of(names, lambda: shape_of(self._graph, names))

    def algorithms(self, op: str) -> tuple[str, ...]:
        """Names that `predict` knows for an operation: those with a formula and those measured.

        Raises:
            ConfigError: Unknown op; the message lists the known ones.

        """
        return _names(op, self._kept.curves)

    def observe(self, samples: Sequence[Mapping[str, Any]]) -> None:  # Any: JSON-like rows
        """Learn from measurements: rows of op, nbytes, group_size, algorithm, time_us, members.

        `members` are the device ids of the group, in any order. A row may do without; it then
        speaks for groups of which only the number is told. An algorithm without a formula (a
        backend's own, such as `one_shot`) is known by its measurements alone. The median of the
        repeats of one size counts. All rows are checked before one is taken, and are taken at once.

        Raises:
            ConfigError: A row lacks a field or has an impossible value (NaN, below 1 byte, a
                group of one, a member that is no device), or they are no rows; nothing was learned.

        """
        taken = self._taken(samples)
        with self._lock:
            self._kept.add(taken)

    def drift(self, samples: Sequence[Mapping[str, Any]]) -> tuple[Drift, ...]:  # Any: as above
        """Curves that fresh measurements contradict; learns nothing from them.

        A curve has drifted when, of at least five samples within its sizes, more than half lie
        outside of their intervals on the same side. `forget` it and calibrate anew.

        Args:
            samples: Rows as for `observe`.

        Raises:
            ConfigError: A row lacks a field or has an impossible value.

        """
        curves, _ = self._measured()
        seen: dict[CurveKey, list[tuple[float, int]]] = {}
        for key, nbytes, time_us, _ in self._taken(samples):
            curve = curves.get(key)
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

    def forget(self, op: str, algorithm: str, group_size: int, shape: str | None = None) -> None:
        """Drop what was measured of one curve, of all shapes by default; none there is no error."""
        with self._lock:
            self._kept.drop(
                lambda k: k[:3] == (op, algorithm, group_size) and shape in (None, k.shape)
            )

    def save(self, library: str, folder: Path | None = None) -> Path:
        """Keep what was measured, for this topology and library version; the file's path.

        Args:
            library: Name and version of what ran the collectives: `nccl 2.27.3`; see
                `live.library_of`.
            folder: Where; None is the user's cache folder.

        Raises:
            ConfigError: The library is no text that says anything.
            OSError: The folder cannot be written.

        """
        from ._cost_profile import default_folder, save_profile  # msgspec, at the first use only

        library_name(library)
        with self._lock:
            curves, members = self._kept.items(), self._kept.members
        place = folder or default_folder()
        return save_profile(place, self._topology.fingerprint, library, curves, members)

    def load(self, library: str, folder: Path | None = None) -> int:
        """Learn what `save` kept for this topology and library version; how many rows are kept.

        Measurements of another topology or version are left where they are. What is known already
        is not learned twice, and counts as later than what the file has.

        Raises:
            ConfigError: The file is no profile; the message names it. Or the library is no text
                that says anything.

        """
        from ._cost_profile import default_folder, load_profile

        library_name(library)
        found = load_profile(folder or default_folder(), self._topology.fingerprint, library)
        here = {s: m for s, m in found.members.items() if self._has_shape(m, s)}
        with self._lock:
            self._kept.merge(found.repeats, here)
        return found.rows

    def freeze(self, groups: Sequence[Sequence[str] | int] = ()) -> CostTable:
        """The model as data, to be broadcast from rank 0 before anybody chooses by it.

        Measured curves keep their op's name, followed by `@` and the shape of the group if it was
        told; `noise:<op>` are the half-widths of their intervals at the knots, in logarithms.
        Formulas are in it as lines of two points under `prior:<op>`, for usual numbers of ranks
        and for the shapes that were measured.

        Args:
            groups: Further groups, as of `predict`, whose formulas the table shall have. Of others
                `select` can only take the formula of the nearest number of ranks.

        Raises:
            ConfigError: A device is unknown, or a group cannot be.

        """
        curves, members = self._measured()
        asked = [self._group(group) for group in groups]
        members = {**{self.shape(names): names for _, names in asked if len(names) > 1}, **members}
        table: dict[tuple[str, str, int], tuple[tuple[int, float], ...]] = {}
        for key, curve in curves.items():
            op = f"{key.op}{MARK_SHAPE}{key.shape}" if key.shape else key.op
            table[op, key.algorithm, key.group_size] = curve.points
            noise = zip(curve.points, curve.noise, strict=True)
            known = tuple((n, wide) for (n, _), wide in noise if wide is not None)
            if known:
                table[f"{MARK_NOISE}{op}", key.algorithm, key.group_size] = known
        priced: list[tuple[str, Sequence[str] | int]] = [
            (f"{MARK_SHAPE}{shape}", names) for shape, names in members.items()
        ]
        sizes = {*_FROZEN_SIZES, *(k.group_size for k in curves), *(size for size, _ in asked)}
        priced += [("", size) for size in sorted(sizes) if size > 1]
        for end, group in priced:
            size = group if isinstance(group, int) else len(group)
            for op, algorithms in ALGORITHMS.items():
                for algorithm in algorithms:
                    line = self._line(op, algorithm, group)
                    table[f"{MARK_PRIOR}{op}{end}", algorithm, size] = line
        return CostTable(self._topology.fingerprint, _VERSION, table)

    def select(
        self, table: CostTable, op: str, nbytes: int, group: Sequence[str] | int
    ) -> tuple[str, Estimate]:
        """The fastest algorithm and its estimate. Pure: equal tables give equal answers.

        Formulas are first scaled to what was measured of the other algorithms, so that an
        optimistic formula does not beat a measurement; where only algorithms without a formula
        were measured, no formula takes part. The estimate is that of `predict` where the table has
        the formulas of the group: of a number of ranks or a shape that was measured or that
        `freeze` was told, and of the usual numbers. Ties go to the first name. A group of one has
        nothing to choose: the op's first name, and no time. Which shape named devices have is
        looked up in this model's topology, which must be the table's.

        Raises:
            ConfigError: The table has nothing for the op, is of another version, or tells shapes
                of another topology; a payload, group or device cannot be, as in `predict`.

        """
        if table.version != _VERSION:
            raise ConfigError(f"cost table of version {table.version}, this reads {_VERSION}")
        nbytes = payload(nbytes)
        size, names = group_of(group)
        algorithms = table_names(table, op)
        if size == 1:
            return algorithms[0], estimate(op, nbytes, 1, (0.0, 0.0, 0.0, "prior"))
        shape = self._shape_in(table, op, names) if names else ""
        best, found = pick(Knowledge.of_table(table, op), algorithms, op, nbytes, size, shape)
        return best, estimate(op, nbytes, size, found)

    def _shape_in(self, table: CostTable, op: str, names: tuple[str, ...]) -> str:
        if not any(MARK_SHAPE in name for name, _, _ in table.curves):
            return _UNTOLD
        if table.fingerprint != self._topology.fingerprint:
            raise ConfigError(
                f"the cost table is of topology {table.fingerprint!r}, this model of "
                f"{self._topology.fingerprint!r}: which shape {names[0]!r} and the others have is "
                "told by the table's; gather one topology for all ranks, or give their number"
            )
        return self.shape(names)

    def _taken(self, samples: Sequence[Mapping[str, Any]]) -> list[Sample]:
        if not isinstance(samples, Iterable):
            raise ConfigError(f"samples are a list of rows, not {samples!r:.60}")
        taken = [sample_of(i, row) for i, row in enumerate(samples)]
        return [s._replace(key=s.key._replace(shape=self.shape(s.members))) for s in taken]

    def _measured(self) -> tuple[Mapping[CurveKey, Curve], Mapping[str, tuple[str, ...]]]:
        """Curves, those of all accelerators also as of their number, and groups by shape."""
        with self._lock:
            curves, members = self._kept.curves, self._kept.members
        every = self._topology.accelerators
        named = [k for k in curves if k.shape and k.group_size == len(every)]
        if not named:
            return curves, members
        whole = self.shape([d.id for d in every])
        numbered = {k._replace(shape=""): curves[k] for k in named if k.shape == whole}
        return {**numbered, **curves}, members

    def _has_shape(self, members: tuple[str, ...], shape: str) -> bool:
        try:
            return self.shape(members) == shape
        except ConfigError:  # devices of a twin of this machine, called otherwise
            return False

    def _formula(self, members: Mapping[str, tuple[str, ...]]) -> Formula:
        def formula(op: str, algorithm: str, nbytes: int, size: int, shape: str) -> float:
            names = members.get(shape, ())
            group = names if len(names) == size else size
            return on_line(self._line(op, algorithm, group), nbytes)

        return formula

    def _group(self, group: Sequence[str] | int) -> tuple[int, tuple[str, ...]]:
        """Size and ids, every device being known; no ids where only a number was told."""
        size, names = group_of(group)
        return size, tuple(self._graph.device(name).id for name in names)

    def _line(self, op: str, algorithm: str, group: Sequence[str] | int) -> _Line:
        """A formula at two payloads, as a table has it; 0 at both where there is none."""
        members = self._members(group)
        size = group if isinstance(group, int) else len(group)
        if algorithm not in ALGORITHMS[op]:
            return tuple((x, 0.0) for x in _LINE)
        if 2 <= size == len(members) <= _cost_load.MOST_RANKS:
            key = (op, algorithm, members)
            fixed, per_byte = self._lines.of(
                key, lambda: _cost_load.line(self._graph, self._way, members, op, algorithm)
            )
            return tuple((x, fixed + per_byte * x) for x in _LINE)
        link, local = self._links.of(members, lambda: self._slowest(members))
        return tuple((x, prior_us(op, algorithm, x, size, link, local=local)) for x in _LINE)

    def _way(self, a: str, b: str) -> _cost_load.Way:
        return self._ways.of((a, b), lambda: _cost_load.way(self._graph, a, b))

    def _members(self, group: Sequence[str] | int) -> tuple[str, ...]:
        if isinstance(group, int):
            return tuple(d.id for d in self._topology.accelerators[:group])
        return tuple(group)

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


def _names(op: str, curves: Iterable[CurveKey]) -> tuple[str, ...]:
    check_op(op)
    return tuple(sorted({*ALGORITHMS[op], *(k.algorithm for k in curves if k.op == op)}))


class _Memory(Generic[_K, _V]):
    """Answers that are kept until there are too many, when the earliest go. Thread-safe."""

    def __init__(self, most: int = _REMEMBERED) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._answers: dict[_K, _V] = {}

    def of(self, key: _K, make: Callable[[], _V]) -> _V:
        with self._lock:
            if key in self._answers:
                return self._answers[key]
        found = make()
        with self._lock:
            while len(self._answers) >= self._most:
                del self._answers[next(iter(self._answers))]
            self._answers[key] = found
        return found
