"""Chinese accelerators' communication libraries as rows of facts behind one adapter.

Importing this package imports neither torch nor a vendor's plug-in, so that a plug-in without
its runtime breaks nothing. `DomesticBackend`, `HCCLBackend` and `CNCLBackend` need torch
and are imported when they are first asked for.
"""

from typing import TYPE_CHECKING

from ._version import __version__ as __version__
from .auto import VendorChoice as VendorChoice, choose_vendor as choose_vendor
from .device_probe import probe_in_process as probe_in_process
from .emulation import can_emulate as can_emulate, emulate as emulate
from .factory import create_domestic_backend as create_domestic_backend
from .host import HostView as HostView
from .preflight import Finding as Finding, preflight as preflight
from .runtime import VendorRuntime as VendorRuntime, load_vendor as load_vendor
from .specs import backend_spec as backend_spec
from .vendor_spec import VendorSpec as VendorSpec
from .vendors import VENDORS as VENDORS, find_vendor as find_vendor

if TYPE_CHECKING:
    from .backend import DomesticBackend as DomesticBackend
    from .cncl_backend import CNCLBackend as CNCLBackend
    from .hccl_backend import HCCLBackend as HCCLBackend

__all__ = [
    "VENDORS",
    "CNCLBackend",
    "DomesticBackend",
    "Finding",
    "HCCLBackend",
    "HostView",
    "VendorChoice",
    "VendorRuntime",
    "VendorSpec",
    "__version__",
    "backend_spec",
    "can_emulate",
    "choose_vendor",
    "create_domestic_backend",
    "emulate",
    "find_vendor",
    "load_vendor",
    "preflight",
    "probe_in_process",
]

_NEED_TORCH = {
    "DomesticBackend": "backend",
    "HCCLBackend": "hccl_backend",
    "CNCLBackend": "cncl_backend",
}


def __getattr__(name: str) -> object:
    if name not in _NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    from .runtime import import_torch

    import_torch()
    return getattr(import_module(f".{_NEED_TORCH[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
