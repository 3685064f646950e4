"""A start-up measurement of a backend's algorithms, kept for the next start.

Rank 0's table is everybody's. It lies in the user's cache folder, under a name made of the
machines of the group, torch's release and the backend.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch

from sagellm.core.protocols import CommBackendProtocol, ConfigError, CostModelProtocol, CostTable

from ._version import __version__
from .choice import AlgorithmTable, Rule

__all__ = [
    "SIZES",
    "cached_table",
    "is_whole",
    "keep_table",
    "measure",
    "sample_model",
    "table_key",
]

logger = logging.getLogger(__name__)

SIZES = (1 << 10, 1 << 15, 1 << 20)
_CALLS = ("all_reduce", "all_gather", "reduce_scatter")
_REPEATS = 5
_VERSION = 1
_MODEL_SIZES = tuple(1 << bits for bits in range(10, 27, 2))

Use = Callable[[AlgorithmTable], None]
"""Makes the backend choose by a table from now on."""


def measure(
    backend: CommBackendProtocol,
    use: Use,
    key: str,
    names: Mapping[str, Collection[str]],
    *,
    sizes: Sequence[int] = SIZES,
    repeats: int = _REPEATS,
    budget_s: float = 1.5,
) -> CostTable:
    """Microseconds of each algorithm at a few sizes: the median of the slowest rank. Collective.

    Ends early, on all ranks alike, when rank 0 finds the budget spent; what was not measured by
    then has no curve, and the default keeps it.

    Args:
        backend: Whose calls are timed.
        use: Lets it run by one algorithm.
        key: Fingerprint of the table.
        names: Algorithms by operation, the default first.
        sizes: Bytes of one rank's input, rising.
        repeats: Calls of each algorithm at each size.
        budget_s: Longest time, but for the call that is running.

    """
    size = backend.size
    points: dict[tuple[str, str, int], list[tuple[int, float]]] = {}
    end = time.monotonic() + budget_s
    for nbytes in sizes:
        for op in (op for op in _CALLS if op in names):
            for name in names[op]:
                use(AlgorithmTable((Rule(op, 0, None, name),), "calibration"))
                call = _call(backend, op, nbytes)
                call()
                times = []
                for _ in range(repeats):
                    start = time.perf_counter()
                    call()
                    times.append(time.perf_counter() - start)
                use(AlgorithmTable())
                # One exchange: the slowest rank's time, and whether rank 0 wants to stop.
                spent = backend.rank == 0 and time.monotonic() >= end
                seen = torch.tensor(
                    [statistics.median(times) * 1e6, float(spent)], dtype=torch.float64
                )
                backend.all_reduce(seen, "max")
                points.setdefault((op, name, size), []).append((nbytes, float(seen[0])))
                if seen[1]:
                    return CostTable(key, _VERSION, {k: tuple(v) for k, v in points.items()})
    return CostTable(key, _VERSION, {k: tuple(v) for k, v in points.items()})


def is_whole(
    table: CostTable, names: Mapping[str, Collection[str]], group: int, sizes: Sequence[int]
) -> bool:
    """Whether a calibration had the time to measure everything."""
    wanted = [(op, name, group) for op in _CALLS for name in names.get(op, ())]
    return all(len(table.curves.get(key, ())) == len(sizes) for key in wanted)


def sample_model(
    model: CostModelProtocol, table: CostTable, names: Mapping[str, Collection[str]], size: int
) -> CostTable:
    """What a model expects of each algorithm, as curves; those it knows nothing of have none."""
    curves: dict[tuple[str, str, int], tuple[tuple[int, float], ...]] = {}
    for op, ours in names.items():
        for name in ours:
            only = {k: points for k, points in table.curves.items() if k[1] == name}
            alone = CostTable(table.fingerprint, table.version, only)
            with contextlib.suppress(ConfigError):  # the model does not know it
                curves[op, name, size] = tuple(
                    (n, model.select(alone, op, n, size)[1].time_us) for n in _MODEL_SIZES
                )
    return CostTable(table.fingerprint, _VERSION, curves)


def _call(backend: CommBackendProtocol, op: str, nbytes: int) -> Callable[[], object]:
    x = torch.zeros(nbytes // 4)
    if op == "all_reduce":
        return lambda: backend.all_reduce(x)
    if op == "all_gather":
        out = torch.zeros(x.numel() * backend.size)
        return lambda: backend.all_gather_into_tensor(out, x)
    whole = torch.zeros(max(1, x.numel() // backend.size) * backend.size)
    part = torch.zeros(whole.numel() // backend.size)
    return lambda: backend.reduce_scatter_tensor(part, whole)


def table_key(backend: CommBackendProtocol, more: Sequence[str] = ()) -> str:
    """Equal for groups that would measure alike: machines, releases, backend. Collective."""
    mine = hashlib.sha256(_machine().encode()).digest()[:7]
    hosts = backend.all_gather(torch.tensor([int.from_bytes(mine, "big")]))
    assert isinstance(hosts, list)
    machines = [str(int(h.item())) for h in hosts]
    facts = [backend.name, torch.__version__, __version__, *more, *machines]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def _machine() -> str:
    try:
        name = Path("/etc/machine-id").read_text().strip()
    except OSError:
        name = ""
    return f"{name or platform.node()} {platform.machine()} {os.cpu_count()}"


def _path(key: str) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sagellm-comm" / f"collective_ops-{key}.json"


def cached_table(key: str) -> CostTable | None:
    """What `keep_table` kept; None where there is nothing, or something else."""
    path = _path(key)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["fingerprint"] != key or found["version"] != _VERSION:
            return None
        curves = {
            (str(op), str(name), int(size)): tuple((int(n), float(t)) for n, t in points)
            for op, name, size, points in found["curves"]
        }
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as e:
        logger.warning("%s is no calibration and is measured anew: %s", path, e)
        return None
    return CostTable(key, _VERSION, curves)


def keep_table(table: CostTable) -> None:
    """Write a table to the user's cache folder; a folder that cannot be written is no error."""
    path = _path(table.fingerprint)
    curves = [[*k, [list(p) for p in points]] for k, points in table.curves.items()]
    text = json.dumps(
        {"fingerprint": table.fingerprint, "version": table.version, "curves": curves}
    )
    part = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as e:
        logger.info("calibration is not kept: %s", e)
