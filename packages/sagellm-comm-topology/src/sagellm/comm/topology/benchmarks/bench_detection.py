"""How long `detect()` takes: on this host, and on a drawn eight-GPU server of 600 PCI functions.

The drawn server's driver is a stand-in that takes 10 us a call. Contenders are what a program
would otherwise do: run `lspci`, `lstopo` or `nvidia-smi topo -m`, or read the same files with
pathlib, one after the other. The clock is inside the process, after imports; `import` cases time a
fresh interpreter, less what an empty one takes. Two figures are shares and not times: how much of
what `lstopo` and `lspci` list here is found, and how many recorded machines are read without error.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from sagellm.comm.topology import TopologyManager, _nvml
from sagellm.comm.topology.benchmarks.fake_machine import StubNvml, draw_hgx
from sagellm.comm.topology.benchmarks.recorded import case_files, mismatches
from sagellm.comm.topology.detector import installed_detectors
from sagellm.comm.topology.importers import import_topology
from sagellm.core.protocols import DetectorSpec
from sagellm.core.protocols.bench import Benchmark, Missing, Ratio, Row

CALL_S = 10e-6
FUNCTIONS = 600
GOAL_HOST_S, GOAL_DRAWN_S = 0.005, 0.100

Contenders = Mapping[str, Callable[[], float | None] | Missing]


def contenders(case: Mapping[str, Any]) -> Contenders | AbstractContextManager[Contenders]:
    if case["machine"] == "import":
        return {
            "sagellm.comm.topology": lambda: import_s("sagellm.comm.topology"),
            "pydantic": lambda: import_s("pydantic"),
        }
    if case["machine"] == "this host":
        manager = TopologyManager()
        return {
            "detect": lambda: timed(lambda: manager.detect(refresh=True)),
            "lspci -vmm": command("lspci", "-vmm"),
            "lstopo": command("lstopo-no-graphics", "--of", "console"),
            "nvidia-smi topo -m": command("nvidia-smi", "topo", "-m"),
        }
    return drawn_server(case["functions"])


@contextlib.contextmanager
def drawn_server(functions: int) -> Iterator[Contenders]:
    with tempfile.TemporaryDirectory(prefix="topology-") as folder:
        root = draw_hgx(Path(folder) / "root", functions=functions).root
        gpus = [f"0000:{0x13 + 0x30 * p + i:02x}:00.0" for p in range(4) for i in range(2)]
        stub = StubNvml(gpus, peers={g: ["switch"] * 18 for g in gpus}, call_s=CALL_S)
        detector = _nvml.NvmlDetector(lambda: stub)
        nvml = DetectorSpec("nvml", 80, lambda: detector, ("0x10de",))
        specs = [nvml if s.name == "nvml" else s for s in installed_detectors()]
        manager = TopologyManager(root=root, environ={}, detectors=specs)
        assert manager.detect().num_devices == 8
        yield {
            "detect": lambda: timed(lambda: manager.detect(refresh=True)),
            "pathlib reader": lambda: timed(lambda: read_plainly(root)),
        }


def read_plainly(root: Path) -> int:
    """What a straightforward script reads of every PCI function; the number of bytes."""
    total = 0
    names = ("class", "vendor", "device", "numa_node", "local_cpulist", "max_link_speed",
             "max_link_width")  # fmt: skip
    for entry in sorted((root / "sys/bus/pci/devices").iterdir()):
        place = entry.resolve()
        for name in names:
            with contextlib.suppress(OSError):
                total += len((place / name).read_text())
    return total


def share_of_lstopo() -> float | None:
    """How much of what hwloc lists on this host is found; None without hwloc."""
    name = "lstopo-no-graphics"
    if shutil.which(name) is None:
        return None
    done = subprocess.run((name, "--of", "xml"), capture_output=True, timeout=60, check=True)
    theirs, ours = import_topology(done.stdout), TopologyManager().detect(refresh=True)
    kinds = ("gpu", "npu", "nic", "display", "fabric_switch", "numa")
    listed = {d.id for d in theirs.devices if d.kind in kinds}
    listed |= {f"net {n}" for d in theirs.devices for n in names(d.attrs, "netdev")}
    found = {d.id for d in ours.devices}
    found |= {bdf for d in ours.devices for bdf in names(d.attrs, "virtual_functions")}
    found |= {f"net {n}" for d in ours.devices for n in names(d.attrs, "netdev")}
    return len(listed & found) / len(listed) if listed else 1.0


def share_of_lspci() -> float | None:
    """How many displays, accelerators and network functions of lspci are found; None without it."""
    if shutil.which("lspci") is None:
        return None
    done = subprocess.run(("lspci", "-D", "-nn"), capture_output=True, timeout=60, check=True)
    listed = {
        line.split()[0]
        for line in done.stdout.decode("utf-8", "replace").splitlines()
        if re.search(r"\[(?:02|03|12)[0-9a-f]{2}\]:", line)
    }
    devices = TopologyManager().detect(refresh=True).devices
    found = {d.bdf for d in devices}
    found |= {bdf for d in devices for bdf in names(d.attrs, "virtual_functions")}
    return len(listed & found) / len(listed) if listed else 1.0


def share_of_recorded() -> float | None:
    """How many recorded machines are read without a single error; None without them."""
    cases = case_files()
    return sum(not mismatches(c) for c in cases) / len(cases) if cases else None


def names(attrs: Mapping[str, str], key: str) -> list[str]:
    return [n for n in attrs.get(key, "").split(",") if n]


def timed(call: Callable[..., object], *args: object) -> float:
    start_s = time.perf_counter()
    call(*args)
    return time.perf_counter() - start_s


def command(*words: str) -> Callable[[], float | None] | Missing:
    if shutil.which(words[0]) is None:
        return Missing(f"{words[0]} is not installed")
    return lambda: timed(lambda: subprocess.run(words, capture_output=True, timeout=60, check=True))


def import_s(module: str) -> float:
    code = f"import time; s = time.perf_counter(); import {module}; print(time.perf_counter() - s)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    return float(done.stdout)


def p95(samples: Sequence[float]) -> float:
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, round(0.95 * (len(ordered) - 1)))]


def ratios(rows: Sequence[Row]) -> list[Ratio]:
    found: list[Ratio] = []
    for case in dict.fromkeys(tuple(row.case.items()) for row in rows):
        same = {row.contender: row for row in rows if tuple(row.case.items()) == case}
        where = dict(case)
        if where["machine"] == "import":
            ours, pydantic = same["sagellm.comm.topology"].median, same["pydantic"].median
            value = pydantic / ours if ours and pydantic else None
            found.append(Ratio("pydantic/ours", where, value, goal=0.5))
            continue
        detect = same["detect"]
        budget = GOAL_HOST_S if where["machine"] == "this host" else GOAL_DRAWN_S
        found.append(
            Ratio(f"{budget * 1e3:g} ms/p95 of detect", where, budget / p95(detect.samples), 1.0)
        )
        if where["machine"] == "this host":
            found += [
                Ratio("found/listed by lstopo", where, share_of_lstopo(), 1.0),
                Ratio("found/listed by lspci", where, share_of_lspci(), 1.0),
                Ratio("read right/recorded machines", {}, share_of_recorded(), 1.0),
            ]
        for name, row in same.items():
            if name != "detect" and detect.median:
                value = row.median / detect.median if row.median else None
                found.append(Ratio(f"{name}/detect", where, value, goal=1.0))
    return found


main = Benchmark(
    "detection",
    contenders,
    cases=[
        {"machine": "this host"},
        {"machine": "drawn 8-GPU server", "functions": FUNCTIONS},
        {"machine": "import"},
    ],
    ratios=ratios,
    repeats=40,
    warmup=2,
    distributions=("sagellm-comm-topology", "nvidia-ml-py", "msgspec", "pydantic"),
).main

if __name__ == "__main__":
    raise SystemExit(main())
