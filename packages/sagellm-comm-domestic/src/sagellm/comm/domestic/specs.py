"""Each row of the vendor table as the `BackendSpec` that plug-in discovery hands out.

One name per row stands at the end: the entry points of group `sagellm.comm.backends`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from sagellm.core.protocols import BackendSpec, Capabilities, CommBackendProtocol

from .detect import probe_vendor
from .vendor_spec import VendorSpec
from .vendors import VENDORS

if TYPE_CHECKING:
    from .backend import DomesticBackend

__all__ = ["backend_class", "backend_spec"]

_OPS = frozenset(
    {
        "all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single",
        "all_gather", "reduce_scatter", "all_to_all", "broadcast", "reduce", "gather", "scatter",
        "send", "recv", "batch_p2p", "send_kv_blocks", "recv_kv_blocks", "barrier",
    }
)  # fmt: skip
_OWN_DEVICE_PRIORITY = 100
_CUDA_ALIAS_PRIORITY = 200
"""Above NVIDIA's own backend: where such a row's probe holds, `nccl` is the vendor's library."""
_ORDER = {name: place for place, name in enumerate(VENDORS)}
"""Between rows that could all be meant, the better known comes first."""


def backend_spec(row: VendorSpec) -> BackendSpec:
    """The row as plug-in discovery wants it; nothing is imported or looked at for this."""
    return BackendSpec(
        name=row.backend,
        device_types=(row.device,),
        c10d_name=row.c10d_name,
        priority=_priority(row),
        capabilities=Capabilities(
            ops=_OPS,
            reduce_ops=row.reduce_ops,
            dtypes=row.reduce_dtypes,
            move_dtypes=row.move_dtypes,
            uneven=row.uneven,
            verified_on_hardware=False,
        ),
        probe=partial(probe_vendor, row),
        load=partial(_load, row),
        lowering=row.lowering,
        options={name: f"{kind.__name__}: {text}" for name, (kind, text) in row.options.items()},
        install_hint=row.install_hint,
        vendor=row.vendor,
    )


def _priority(row: VendorSpec) -> int:
    base = _CUDA_ALIAS_PRIORITY if row.dispatch == "cuda" else _OWN_DEVICE_PRIORITY
    return base - _ORDER.get(row.backend, len(_ORDER))


def backend_class(row: VendorSpec) -> type[DomesticBackend]:
    """The adapter's class for a row; imports torch."""
    from .backend import DomesticBackend
    from .cncl_backend import CNCLBackend
    from .hccl_backend import HCCLBackend

    own: dict[str, type[DomesticBackend]] = {"hccl": HCCLBackend, "cncl": CNCLBackend}
    return own.get(row.backend, DomesticBackend)


def _load(row: VendorSpec) -> Callable[..., CommBackendProtocol]:
    from .runtime import load_vendor

    load_vendor(row)
    return backend_class(row)


HCCL = backend_spec(VENDORS["hccl"])
CNCL = backend_spec(VENDORS["cncl"])
MCCL = backend_spec(VENDORS["mccl"])
HYGON = backend_spec(VENDORS["hygon"])
KUNLUN = backend_spec(VENDORS["kunlun"])
METAX = backend_spec(VENDORS["metax"])
ILUVATAR = backend_spec(VENDORS["iluvatar"])
ECCL = backend_spec(VENDORS["eccl"])
BCCL = backend_spec(VENDORS["bccl"])
SCCL = backend_spec(VENDORS["sccl"])
TCCL = backend_spec(VENDORS["tccl"])
