"""What real GPUs do beside what the topology predicts of them; unverified on hardware.

Three things, and where there is no GPU (or only one, for peers) the columns stay empty and say why:

- `nvml`: what the NVML detector takes in a whole `detect()`, beside `nvidia-smi topo -m`;
- `copy`: pinned host memory to the first GPU and back, beside the narrowest link that is known
  between the GPU and its NUMA node;
- `peer`: the first GPU to each of the others, beside the bottleneck of the path between them and
  beside what the cost model gives a message before anything was measured.

Times are of one copy, of several that wait for the last one. Every ratio is predicted time over
measured time: 1 is a right prediction, less is a machine slower than predicted.
"""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sagellm.comm.topology import TopologyManager
from sagellm.comm.topology.benchmarks.bench_detection import command, p95
from sagellm.comm.topology.cost_model import CostModel
from sagellm.core.protocols import Device
from sagellm.core.protocols.bench import Benchmark, Missing, Ratio, Row

COPIES = 4
NBYTES = 256 << 20
GOAL_NVML_S = 0.100

Contenders = Mapping[str, Callable[[], float | None] | Missing]
Torch = Any  # the module; loaded only here, and a few calls of it


def cuda() -> Torch | Missing:
    """torch with at least one CUDA device, or why there is none."""
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return Missing("torch is not installed: unverified on hardware")
    if not torch.cuda.is_available():
        return Missing("torch sees no CUDA device here: unverified on hardware")
    return torch


def contenders(case: Mapping[str, Any]) -> Contenders:
    torch = cuda()
    if isinstance(torch, Missing):
        return {"measured": torch, "predicted": torch}
    manager = TopologyManager()
    if case["what"] == "nvml":
        return nvml(manager)
    if case["what"] == "copy":
        return host_copies(torch, manager, case["nbytes"])
    return peer_copies(torch, manager, case["nbytes"])


def nvml(manager: TopologyManager) -> Contenders:
    if "nvml" not in manager.detect().provenance:
        return {"nvml": Missing("no NVIDIA GPU in /sys: the NVML detector does not run")}
    return {
        "nvml": lambda: manager.detect(refresh=True).provenance["nvml"],
        "nvidia-smi topo -m": command("nvidia-smi", "topo", "-m"),
    }


def host_copies(torch: Torch, manager: TopologyManager, nbytes: int) -> Contenders:
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(nbytes, dtype=torch.uint8, device="cuda:0")
    bytes_per_s = to_processor(manager, device_of(torch, manager, 0))
    predicted = constant(bytes_per_s, nbytes, "no link from the GPU to its host states a bandwidth")
    return {
        "H2D measured": lambda: copy_s(torch, host, there),
        "D2H measured": lambda: copy_s(torch, there, host),
        "H2D predicted": predicted,
        "D2H predicted": predicted,
    }


def peer_copies(torch: Torch, manager: TopologyManager, nbytes: int) -> Contenders:
    count = torch.cuda.device_count()
    if count < 2:
        why = Missing("one GPU has no peer: unverified on hardware")
        return {"0-1 measured": why, "0-1 predicted": why}
    found: dict[str, Callable[[], float | None] | Missing] = {}
    model, first = CostModel(manager.detect()), device_of(torch, manager, 0)
    source = torch.empty(nbytes, dtype=torch.uint8, device="cuda:0")
    for peer in range(1, count):
        there = torch.empty(nbytes, dtype=torch.uint8, device=f"cuda:{peer}")
        other = device_of(torch, manager, peer)
        path = manager.path(first.id, other.id)
        estimate = model.predict("p2p", nbytes, [first.id, other.id], "direct")
        found[f"0-{peer} measured"] = functools.partial(copy_s, torch, source, there)
        found[f"0-{peer} predicted"] = constant(
            path.bottleneck_bytes_per_s, nbytes, f"the path has no stated bandwidth ({path.kind})"
        )
        found[f"0-{peer} by the cost model"] = functools.partial(float, estimate.time_us / 1e6)
    return found


def device_of(torch: Torch, manager: TopologyManager, index: int) -> Device:
    """The device that torch numbers so: by UUID, for the order of CUDA need not be the driver's."""
    uuid = str(getattr(torch.cuda.get_device_properties(index), "uuid", "")).lower()
    for device in manager.detect().accelerators:
        if uuid and (device.uuid or "").lower().removeprefix("gpu-") == uuid:
            return device
    return manager.device(index)


def to_processor(manager: TopologyManager, device: Device) -> float | None:
    """The narrowest known bandwidth between a GPU and its NUMA node; None where none is known."""
    home = manager.nearest(device.id, "numa") or manager.nearest(device.id, "pci_root")
    links = manager.path(device.id, home.id).links if home else ()
    return min((x.bandwidth_bytes_per_s for x in links if x.bandwidth_bytes_per_s), default=None)


def constant(bytes_per_s: float | None, nbytes: int, why: str) -> Callable[[], float] | Missing:
    return Missing(why) if not bytes_per_s else lambda: nbytes / bytes_per_s


def copy_s(torch: Torch, source: Any, target: Any) -> float:  # noqa: ANN401 - tensors of torch
    """Seconds of one copy, of several that are waited for together."""
    for tensor in (source, target):
        if tensor.is_cuda:
            torch.cuda.synchronize(tensor.device)
    start_s = time.perf_counter()
    for _ in range(COPIES):
        target.copy_(source, non_blocking=True)
    for tensor in (source, target):
        if tensor.is_cuda:
            torch.cuda.synchronize(tensor.device)
    return (time.perf_counter() - start_s) / COPIES


def ratios(rows: Sequence[Row]) -> list[Ratio]:
    found: list[Ratio] = []
    for row in rows:
        same = {r.contender: r for r in rows if r.case == row.case}
        if row.contender == "nvml":
            value = GOAL_NVML_S / p95(row.samples) if row.samples else None
            found.append(Ratio("100 ms/p95 of NVML", row.case, value, 1.0))
            value = quotient(same.get("nvidia-smi topo -m"), row)
            found.append(Ratio("nvidia-smi topo -m/NVML", row.case, value, 1.0))
        if not row.contender.endswith("measured"):
            continue
        way = row.contender.removesuffix("measured")
        for what in ("predicted", "by the cost model"):
            if way + what in same:
                value = quotient(same[way + what], row)
                found.append(Ratio(f"{way}{what}/measured time", row.case, value))
    return found


def quotient(above: Row | None, below: Row) -> float | None:
    if above is None or above.median is None or not below.median:
        return None
    return above.median / below.median


main = Benchmark(
    "gpu",
    contenders,
    cases=[
        {"what": "nvml"},
        {"what": "copy", "nbytes": NBYTES},
        {"what": "peer", "nbytes": NBYTES},
    ],
    ratios=ratios,
    repeats=15,
    warmup=2,
    distributions=("sagellm-comm-topology", "nvidia-ml-py", "torch"),
).main

if __name__ == "__main__":
    raise SystemExit(main())
