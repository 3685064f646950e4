"""Collectives of a few processes of this machine, timed for the cost model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

from sagellm.core.protocols import (
    BackendSpec,
    BackendUnavailableError,
    CommTimeoutError,
    ConfigError,
    DistributedRuntimeError,
)

from .calibration import check_range

__all__ = [
    "NATIVE", "OPS", "TORCH_OWN", "calibrate_live", "check_backend", "check_devices", "library_of",
    "sweep_live",
]  # fmt: skip

NATIVE = "native"
"""Algorithm under which a library's own choice is recorded."""

OPS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all")
"""Operations that can be timed."""

TORCH_OWN = ("gloo", "nccl")
"""Backends that need no plug-in."""

_MOST_RANKS = 64


def library_of(backend: str) -> str:
    """What measurements of a backend are kept under: the library that moves the bytes.

    NCCL (RCCL on ROCm) tells its own version, which a torch of one version may be built or loaded
    with in several; gloo has none but torch's, being part of it; another backend has that of the
    package which brings it.

    Raises:
        ConfigError: No such backend; the message lists the known ones.
        BackendUnavailableError: torch is not installed, or has no NCCL.

    """
    _torch_version()
    if backend == "gloo":
        return f"gloo torch-{_torch_version()}"
    if backend == "nccl":
        return _nccl_version()
    from sagellm.core.protocols.selection import BACKENDS_GROUP, backend_registry  # brings pydantic

    for entry in entry_points(group=BACKENDS_GROUP, name=backend):
        if entry.dist is not None:
            return f"{backend} {entry.dist.name}-{entry.dist.version}"
    backend_registry().load(backend)  # an unknown name is refused here
    return backend


def check_devices(backend: str, ranks: int) -> None:
    """Refuse more ranks than there are devices for them; CPU backends need none.

    Raises:
        BackendUnavailableError: There are too few; the message says how many torch sees.

    """
    if backend != "nccl":
        return
    _nccl_version()
    import torch

    seen = torch.cuda.device_count()
    if seen < ranks:
        raise BackendUnavailableError(
            f"nccl needs a GPU for each of {ranks} ranks, torch {torch.__version__} sees {seen}: "
            "ask for fewer ranks, or check the driver and CUDA_VISIBLE_DEVICES"
        )


def _torch_version() -> str:
    try:
        return version("torch")
    except PackageNotFoundError:
        raise BackendUnavailableError(
            "timing collectives needs torch: install a CPU or device build of torch>=2.6"
        ) from None


def _nccl_version() -> str:
    import torch

    if not torch.distributed.is_nccl_available():
        raise BackendUnavailableError(
            f"torch {torch.__version__} has no NCCL: install a CUDA or ROCm build of torch"
        )
    told: Any = torch.cuda.nccl.version  # torch leaves it untyped
    name = "rccl" if torch.version.hip else "nccl"
    return f"{name} {'.'.join(map(str, told()))}"


def calibrate_live(
    backend: str,
    ranks: int,
    *,
    ops: Sequence[str] = ("all_reduce",),
    smallest: int = 4 << 10,
    largest: int = 16 << 20,
    knots: int = 12,
    repeats: int = 7,
    timeout_s: float = 300.0,
) -> list[dict[str, Any]]:  # Any: JSON-like rows
    """Rows for `CostModel.observe` at adaptive sizes, the slowest rank's times. Blocks.

    Starts `ranks` processes of this host, which meet over a file and, by gloo, over loopback;
    they end with this call, whatever happens.

    Args:
        backend: `gloo`, which is torch's own; `nccl`, torch's too, a GPU for each rank
            (unverified on hardware); or the name of an installed backend that serves the CPU.
        ranks: 2 to 64.
        ops: Of `OPS`.
        smallest: First payload in bytes.
        largest: Last payload.
        knots: Most sizes of each operation.
        repeats: Times taken at each size, at least 5.
        timeout_s: For all of it.

    Raises:
        ConfigError: An argument cannot be; no process was started.
        BackendUnavailableError: torch, the backend or a GPU for each rank of NCCL is missing.
        CommTimeoutError: It took longer than `timeout_s`.
        DistributedRuntimeError: A rank failed; the message has its last words.

    """
    check_range(smallest, largest, knots)
    plan = {"smallest": smallest, "largest": largest, "knots": knots, "repeats": repeats}
    return _run(backend, ranks, ops, {"calibrate": plan}, repeats, timeout_s)


def sweep_live(
    backend: str,
    ranks: int,
    sizes: Sequence[int],
    *,
    ops: Sequence[str] = ("all_reduce",),
    repeats: int = 12,
    timeout_s: float = 300.0,
) -> list[dict[str, Any]]:  # Any: JSON-like rows
    """Rows at given sizes, in the order they were taken: every size once in each round. Blocks.

    Args and errors are as of `calibrate_live`.
    """
    if not sizes or min(sizes) < 1:
        raise ConfigError(f"sizes must be at least 1 byte: {list(sizes)}")
    sweep = {"sizes": list(sizes), "repeats": repeats}
    return _run(backend, ranks, ops, {"sweep": sweep}, repeats, timeout_s)


def check_backend(name: str) -> BackendSpec | None:
    """The spec of a backend that can be timed here; None for torch's own.

    Raises:
        ConfigError: No such backend; the message lists the known ones.
        BackendUnavailableError: It cannot run here, or not on the CPU.

    """
    if name in TORCH_OWN:
        return None
    from sagellm.core.protocols.selection import backend_registry  # brings pydantic

    spec = backend_registry().load(name)
    probe = spec.probe()
    if not probe.available or "cpu" not in spec.device_types:
        why = probe.reason if not probe.available else f"it serves {spec.device_types}, not the CPU"
        raise BackendUnavailableError(f"backend {name!r} cannot be timed here: {why}")
    return spec


def _run(
    backend: str,
    ranks: int,
    ops: Sequence[str],
    what: Mapping[str, Any],
    repeats: int,
    timeout_s: float,
) -> list[dict[str, Any]]:
    unknown = [op for op in ops if op not in OPS]
    if unknown or not ops:
        raise ConfigError(f"cannot time {unknown or 'nothing'}; known: {', '.join(OPS)}")
    if not 2 <= ranks <= _MOST_RANKS:
        raise ConfigError(f"ranks must be 2 to {_MOST_RANKS}, not {ranks}")
    if repeats < 5:
        raise ConfigError(f"medians need at least 5 repeats, not {repeats}")
    if not timeout_s > 0:
        raise ConfigError(f"timeout_s must be above 0, not {timeout_s}")
    _torch_version()
    check_backend(backend)
    check_devices(backend, ranks)
    with tempfile.TemporaryDirectory(prefix="sagellm-live-") as name:
        folder = Path(name)
        job = {"backend": backend, "ranks": ranks, "ops": list(ops), "timeout_s": timeout_s, **what}
        (folder / "job.json").write_text(json.dumps(job))
        _play(folder, ranks, timeout_s)
        rows: list[dict[str, Any]] = json.loads((folder / "rows.json").read_text())
        return rows


def _play(folder: Path, ranks: int, timeout_s: float) -> None:
    """Run the rank processes to their end; none is left when this returns."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "sagellm.comm.topology._live_rank", str(folder)]
    processes = []
    end_s = time.monotonic() + timeout_s
    try:
        for rank in range(ranks):
            with open(folder / f"words.{rank}", "wb") as words:
                processes.append(
                    subprocess.Popen(
                        [*command, str(rank)], env=environ, stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL, stderr=words,
                    )
                )  # fmt: skip
        waiting = dict(enumerate(processes))
        while waiting:
            for rank, process in list(waiting.items()):
                try:
                    # The others are waited for in slices, so that a failure is seen at once.
                    code = process.wait(0.05)
                except subprocess.TimeoutExpired:
                    if time.monotonic() >= end_s:
                        raise CommTimeoutError(
                            f"ranks {sorted(waiting)} of {ranks} took longer than {timeout_s:g} s"
                        ) from None
                    continue
                del waiting[rank]
                if code:
                    raise _failure(folder, rank, code)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def _failure(folder: Path, rank: int, code: int) -> DistributedRuntimeError:
    lines = (folder / f"words.{rank}").read_text(errors="replace").strip().splitlines()
    said = lines[-1] if lines else "it said nothing"
    kind = BackendUnavailableError if "BackendUnavailableError" in said else DistributedRuntimeError
    found: Any = kind(f"rank {rank} ended with exit code {code}: {said}")
    return found  # type: ignore[no-any-return]  # both are errors to be raised
