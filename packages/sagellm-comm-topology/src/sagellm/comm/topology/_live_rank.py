"""One rank of `live`: `python -m sagellm.comm.topology._live_rank FOLDER RANK`."""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sagellm.comm.topology.calibration import calibrate
from sagellm.comm.topology.live import NATIVE, check_backend
from sagellm.core.protocols import CommBackendProtocol

if TYPE_CHECKING:
    import torch

_SAMPLE_S = 400e-6  # a sample of small payloads is the mean of calls that take about this long
_MOST_CALLS = 20


def main(folder: Path, rank: int) -> None:
    """Do what the job file says; rank 0 writes the rows."""
    import torch
    import torch.distributed as dist

    job = json.loads((folder / "job.json").read_text())
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    size = int(job["ranks"])
    library, device = "gloo", torch.device("cpu")
    if job["backend"] == "nccl":  # tested with a stand-in; unverified on hardware
        library, device = "nccl", torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        library, init_method=f"file://{folder / 'meet'}", rank=rank, world_size=size,
        timeout=timedelta(seconds=job["timeout_s"]),
    )  # fmt: skip
    backend = _backend(job["backend"], job["timeout_s"])
    rows: list[dict[str, Any]] = []
    try:
        timers = {op: _Timer(backend, op, size, device) for op in job["ops"]}
        if "calibrate" in job:
            for op, timer in timers.items():
                rows += _calibrated(timer, op, size, job["calibrate"])
        else:
            rows = _swept(timers, size, device, **job["sweep"])
    finally:
        if backend is not None:
            backend.close()
        dist.destroy_process_group()
    if rank == 0:
        part = folder / "rows.part"
        part.write_text(json.dumps(rows))
        part.replace(folder / "rows.json")


def _backend(name: str, timeout_s: float) -> CommBackendProtocol | None:
    """None is torch's own gloo or NCCL; others come from their entry point."""
    import torch.distributed as dist

    spec = check_backend(name)
    if spec is None:
        return None
    return spec.load()(spec, dist.group.WORLD, device="cpu", timeout_s=min(timeout_s, 60.0))


class _Timer:
    """Takes the slowest rank's microseconds of one operation, equal on all ranks."""

    def __init__(
        self, backend: CommBackendProtocol | None, op: str, size: int, device: torch.device
    ) -> None:
        self._backend = backend
        self._op = op
        self._size = size
        self._device = device
        self._calls: dict[int, tuple[Callable[[], object], int]] = {}

    def take(self, nbytes: int, repeats: int) -> list[float]:
        """Some samples in a row."""
        return _slowest([self.sample(nbytes) for _ in range(repeats)], self._device)

    def sample(self, nbytes: int) -> float:
        """This rank's microseconds of one call; the mean of several where they are short."""
        if nbytes not in self._calls:
            call = self._call(nbytes)
            call()
            (once_us,) = _slowest([self._timed(call, 1)], self._device)
            self._calls[nbytes] = call, max(1, min(_MOST_CALLS, int(_SAMPLE_S * 1e6 / once_us)))
        return self._timed(*self._calls[nbytes])

    def _timed(self, call: Callable[[], object], times: int) -> float:
        import torch.distributed as dist

        dist.barrier()
        self._settle()
        start_s = time.perf_counter()
        for _ in range(times):
            call()
        self._settle()
        return 1e6 * (time.perf_counter() - start_s) / times

    def _settle(self) -> None:
        if self._device.type == "cuda":
            import torch

            torch.cuda.synchronize(self._device)

    def _call(self, nbytes: int) -> Callable[[], object]:
        import torch
        import torch.distributed as dist

        count = max(1, nbytes // 4 // self._size) * self._size
        x, y = (torch.zeros(count, device=self._device) for _ in range(2))
        part = torch.zeros(count // self._size, device=self._device)
        b = self._backend
        if self._op == "all_reduce":
            return lambda: dist.all_reduce(x) if b is None else b.all_reduce(x)
        if self._op == "broadcast":
            return lambda: dist.broadcast(x, 0) if b is None else b.broadcast(x, 0)
        if self._op == "all_gather":
            if b is None:
                return lambda: dist.all_gather_into_tensor(x, part)
            return lambda: b.all_gather_into_tensor(x, part)
        if self._op == "reduce_scatter":
            if b is None:
                return lambda: dist.reduce_scatter_tensor(part, x)
            return lambda: b.reduce_scatter_tensor(part, x)
        return lambda: dist.all_to_all_single(y, x) if b is None else b.all_to_all_single(y, x)


def _slowest(times: Sequence[float], device: torch.device) -> list[float]:
    import torch
    import torch.distributed as dist

    seen = torch.tensor(times, dtype=torch.float64, device=device)
    dist.all_reduce(seen, dist.ReduceOp.MAX)
    found: list[float] = seen.tolist()
    return found


def _calibrated(timer: _Timer, op: str, size: int, plan: dict[str, Any]) -> list[dict[str, Any]]:
    repeats = plan.pop("repeats")
    rows = calibrate(
        lambda n: timer.take(n, repeats), op=op, algorithm=NATIVE, group_size=size,
        multiple=4 * size, **plan,
    )  # fmt: skip
    plan["repeats"] = repeats
    return [dict(row) for row in rows]


def _swept(
    timers: dict[str, _Timer],
    size: int,
    device: torch.device,
    sizes: Sequence[int],
    repeats: int,
) -> list[dict[str, Any]]:
    """Every size once in each round, in a fresh order, so that a drift hits all sizes alike."""
    order = random.Random(0)
    taken: list[tuple[str, int]] = []
    times: list[float] = []
    for _ in range(repeats):
        each = [(op, n) for op in timers for n in sizes]
        order.shuffle(each)
        for op, n in each:
            taken.append((op, n))
            # Three at a time: what is taken is their median, so that one interruption is none.
            times.append(statistics.median(timers[op].sample(n) for _ in range(3)))
    return [
        {"op": op, "algorithm": NATIVE, "group_size": size, "nbytes": n, "time_us": t}
        for (op, n), t in zip(taken, _slowest(times, device), strict=True)
    ]


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
