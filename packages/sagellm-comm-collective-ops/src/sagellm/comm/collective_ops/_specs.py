"""Facts about the backends of this package: what entry points give. No torch here."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

from sagellm.core.protocols import (
    BackendSpec,
    Capabilities,
    CommBackendProtocol,
    Lowering,
    Probe,
)

__all__ = ["GLOO", "HIER", "MOCK", "NCCL", "RCCL", "SHM"]

_OPS = frozenset(
    {
        "all_gather",
        "all_gather_into_tensor",
        "all_reduce",
        "all_to_all",
        "all_to_all_single",
        "barrier",
        "broadcast",
        "gather",
        "recv",
        "reduce",
        "reduce_scatter",
        "reduce_scatter_tensor",
        "scatter",
        "send",
    }
)
_ARITHMETIC = frozenset({"sum", "avg", "min", "max", "product"})
_BITWISE = frozenset({"band", "bor", "bxor"})
_DTYPES = frozenset(
    {"bfloat16", "float16", "float32", "float64", "int8", "uint8", "int32", "int64"}
)
_WIDEN = (
    Lowering("bool", "via_int32", "the library's reduction of bool depends on the release"),
    Lowering("int16", "via_int32", "the library has no 16-bit integer reduction"),
)
_NO_BITWISE = tuple(
    Lowering(op, "refuse", "the library has no bitwise reductions; reduce on the CPU with gloo")
    for op in sorted(_BITWISE)
)
_ALGORITHMS = {
    "algorithms": "which calls run by which schedule instead of the library's own algorithm, such "
    "as `all_reduce:0-64k:direct,all_gather:1m-:ring`; the same on all ranks",
}
_RINGS = {
    "hosts": "the ranks of each host: rings that `algorithms` names pass them host by host",
}
_CALIBRATE = {
    "calibrate": "measure the algorithms when the backend is made (about 1.5 s), or take an "
    "earlier measurement from the user's cache folder",
}
_NCCL_OPTIONS = {
    **_ALGORITHMS,
    **_RINGS,
    "algorithm": "`auto`, `ring` or `tree`: sets NCCL_ALGO before the communicator is made",
}


def _torch_folder() -> Path | None:
    """Where torch is installed, without importing it."""
    try:
        spec = importlib.util.find_spec("torch")
    except (ImportError, ValueError):
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _device_build(library: str, wanted: str, other: str, instead: str) -> str | None:
    """What is wrong with the installed torch for this kind of device; None when nothing is."""
    folder = _torch_folder()
    if folder is None:
        return "torch is not installed; pip install torch"
    if (folder / "lib" / library).exists():
        return None
    if (folder / "lib" / other).exists():
        return f"this torch has {other} instead of {library}; use {instead}"
    return (
        f"this torch is built without {wanted} ({library} is missing); install its {wanted} build"
    )


def _probe_nccl() -> Probe:
    wrong = _device_build("libtorch_cuda.so", "CUDA", "libtorch_hip.so", "rccl")
    if wrong is not None:
        return Probe(False, wrong)
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return Probe(False, "CUDA_VISIBLE_DEVICES hides every device; unset it")
    if not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/dxg").exists():
        return Probe(
            False, "no NVIDIA device node in /dev; install the driver or map the device in"
        )
    return Probe(True, "an NVIDIA device and a CUDA build of torch are present")


def _probe_rccl() -> Probe:
    wrong = _device_build("libtorch_hip.so", "ROCm", "libtorch_cuda.so", "nccl")
    if wrong is not None:
        return Probe(False, wrong)
    if not Path("/dev/kfd").exists():
        return Probe(False, "/dev/kfd is missing; install the AMD driver or map the device in")
    return Probe(True, "/dev/kfd and a ROCm build of torch are present")


def _probe_gloo() -> Probe:
    if sys.platform == "win32":
        return Probe(False, "Windows is not supported; use Linux or macOS")
    if _torch_folder() is None:
        return Probe(False, "torch is not installed; pip install torch")
    return Probe(True, "part of every torch build for this system")


def _probe_shm() -> Probe:
    if not sys.platform.startswith("linux") or not hasattr(os, "memfd_create"):
        return Probe(False, "shared memory without names (memfd_create) is Linux's; use gloo")
    if _torch_folder() is None:
        return Probe(False, "torch is not installed; pip install torch")
    from ._shm.engines import available_engines

    found = available_engines()
    if not found:
        return Probe(
            False,
            f"{platform.machine()} needs the compiled engine, which this installation lacks: "
            f"install a platform wheel, or a C compiler and the sdist; or use gloo",
        )
    return Probe(True, f"engine{'s' * (len(found) > 1)} {', '.join(found)}")


def _probe_mock() -> Probe:
    return Probe(True, "threads of this process")


def _load_nccl() -> Callable[..., CommBackendProtocol]:
    from .nccl_backend import NCCLBackend

    return NCCLBackend


def _load_rccl() -> Callable[..., CommBackendProtocol]:
    from .rccl_backend import RCCLBackend

    return RCCLBackend


def _load_hier() -> Callable[..., CommBackendProtocol]:
    from .hier_backend import HierBackend

    return HierBackend


def _load_gloo() -> Callable[..., CommBackendProtocol]:
    from .gloo_backend import GlooBackend

    return GlooBackend


def _load_shm() -> Callable[..., CommBackendProtocol]:
    from .shm_backend import ShmBackend

    return ShmBackend


def _load_mock() -> Callable[..., CommBackendProtocol]:
    from .mock_backend import MockBackend

    return MockBackend


NCCL = BackendSpec(
    name="nccl",
    device_types=("cuda",),
    c10d_name="nccl",
    priority=100,
    capabilities=Capabilities(
        ops=_OPS,
        reduce_ops=_ARITHMETIC,
        dtypes=_DTYPES,
        uneven=True,
        graph_capture=True,
        coalesce=True,
    ),
    lowering=(*_WIDEN, *_NO_BITWISE),
    options=_NCCL_OPTIONS,
    install_hint="pip install torch (a CUDA build), and an NVIDIA driver",
    probe=_probe_nccl,
    load=_load_nccl,
    vendor="nvidia",
)
"""NCCL on NVIDIA devices. Unverified on hardware."""

RCCL = BackendSpec(
    name="rccl",
    device_types=("cuda",),
    c10d_name="nccl",
    priority=100,
    capabilities=NCCL.capabilities,
    lowering=NCCL.lowering,
    options=_NCCL_OPTIONS,
    install_hint="pip install torch (a ROCm build), and the AMD driver",
    probe=_probe_rccl,
    load=_load_rccl,
    vendor="amd",
)
"""RCCL on AMD devices, which torch calls `cuda` and `nccl`. Unverified on hardware."""

GLOO = BackendSpec(
    name="gloo",
    device_types=("cpu",),
    c10d_name="gloo",
    priority=10,
    capabilities=Capabilities(
        ops=_OPS,
        reduce_ops=(_ARITHMETIC - {"avg"}) | _BITWISE,
        dtypes=_DTYPES,
        uneven=True,
        verified_on_hardware=True,
    ),
    lowering=(
        *_WIDEN,
        Lowering("avg", "avg_as_sum_div", "gloo of torch 2.6 has no avg; later ones divide too"),
    ),
    options={
        **_ALGORITHMS,
        **_RINGS,
        **_CALIBRATE,
    },
    install_hint="pip install torch",
    probe=_probe_gloo,
    load=_load_gloo,
)
"""Gloo on the CPU, over TCP."""

SHM = BackendSpec(
    name="shm",
    device_types=("cpu",),
    c10d_name=None,
    priority=50,
    capabilities=Capabilities(
        ops=_OPS,
        reduce_ops=_ARITHMETIC | _BITWISE,
        dtypes=_DTYPES | {"int16", "bool"},
        uneven=True,
        symmetric_memory=True,
        verified_on_hardware=True,
    ),
    options={
        "engine": "`auto`, `native` or `python`: what runs the calls",
        "slot_bytes": "bytes of a staging slot, two for each rank",
        "arena_bytes": "address space of a rank's symmetric tensors; memory comes with them",
        "algorithms": "overrides such as `all_reduce:0-64k:one_shot`, separated by commas",
        **_CALIBRATE,
    },
    install_hint="pip install sagellm-comm-collective-ops on Linux",
    probe=_probe_shm,
    load=_load_shm,
)
"""Shared memory between the ranks of one host."""

HIER = BackendSpec(
    name="hier",
    device_types=("cpu",),
    c10d_name=None,
    priority=5,
    capabilities=GLOO.capabilities,
    lowering=GLOO.lowering,
    options={
        "hosts": "the ranks of each host, in place of proving who shares one",
        "intra": "`auto`, `shm`, `gloo`, or a function that makes a host's group",
        "algorithm": "`auto`, `leaders`, `two_d` or `flat`: what runs every call",
        "algorithms": "what runs which calls, before that: overrides such as "
        "`all_reduce:0-64k:flat,all_reduce:1m-:two_d`, or a schedule over all ranks",
        "between": "schedule of the stage between hosts, such as `ring` or `all_reduce:1m-:ring`",
        **_CALIBRATE,
        "wire": "`none`, `bf16`, `fp16`, `int8` or `auto`: what all_reduce sends between hosts",
        "allow_lossy": "True lets `wire` round",
        "link_bytes_per_s": "of a host's link, for `wire` auto; measured otherwise",
        "chunk_bytes": "piece of a large all_reduce",
    },
    install_hint="pip install torch",
    probe=_probe_gloo,
    load=_load_hier,
)
"""Shared memory inside hosts, gloo between them."""

MOCK = BackendSpec(
    name="mock",
    device_types=("cpu",),
    c10d_name=None,
    priority=-1,
    capabilities=Capabilities(
        ops=_OPS,
        reduce_ops=_ARITHMETIC | _BITWISE,
        dtypes=_DTYPES | {"int16", "bool"},
        uneven=True,
        verified_on_hardware=True,
    ),
    options={**_ALGORITHMS, **_RINGS},
    install_hint="pip install sagellm-comm-collective-ops",
    probe=_probe_mock,
    load=_load_mock,
)
"""Ranks as threads of one process: for tests, never chosen by `auto`."""
