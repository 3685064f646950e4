"""Collectives over shared memory, NCCL, RCCL, Gloo and an in-process mock behind one protocol.

Importing this package does not import torch, so that finding its backends costs nothing. Every
name below but `__version__` needs torch and is imported when it is first asked for.
"""

from typing import TYPE_CHECKING

from ._version import __version__ as __version__

if TYPE_CHECKING:
    from ._c10d.wrapping import GroupCall as GroupCall
    from ._mock_clock import MockLinks as MockLinks
    from ._mock_group import Transfer as Transfer
    from .c10d import (
        register_c10d_backend as register_c10d_backend,
        wrap_process_group as wrap_process_group,
    )
    from .choice import parse_algorithms as parse_algorithms
    from .factory import (
        create_comm_backend as create_comm_backend,
        explain_selection as explain_selection,
    )
    from .fusion import FusedAllReduce as FusedAllReduce, fused_all_reduce as fused_all_reduce
    from .gloo_backend import GlooBackend as GlooBackend
    from .hier_backend import HierBackend as HierBackend
    from .mock_backend import MockBackend as MockBackend, MockWorld as MockWorld
    from .nccl_backend import NCCLBackend as NCCLBackend
    from .quantized import LossyCollectives as LossyCollectives, error_bound as error_bound
    from .rccl_backend import RCCLBackend as RCCLBackend
    from .schedules import (
        Schedule as Schedule,
        check_schedule as check_schedule,
        make_schedule as make_schedule,
        run_schedule as run_schedule,
    )
    from .shm_backend import ShmBackend as ShmBackend

__all__ = [
    "FusedAllReduce",
    "GlooBackend",
    "GroupCall",
    "HierBackend",
    "LossyCollectives",
    "MockBackend",
    "MockLinks",
    "MockWorld",
    "NCCLBackend",
    "RCCLBackend",
    "Schedule",
    "ShmBackend",
    "Transfer",
    "__version__",
    "check_schedule",
    "create_comm_backend",
    "error_bound",
    "explain_selection",
    "fused_all_reduce",
    "make_schedule",
    "parse_algorithms",
    "register_c10d_backend",
    "run_schedule",
    "wrap_process_group",
]

_NEED_TORCH = {
    "FusedAllReduce": "fusion",
    "GlooBackend": "gloo_backend",
    "GroupCall": "_c10d.wrapping",
    "HierBackend": "hier_backend",
    "LossyCollectives": "quantized",
    "MockBackend": "mock_backend",
    "MockLinks": "_mock_clock",
    "MockWorld": "mock_backend",
    "NCCLBackend": "nccl_backend",
    "RCCLBackend": "rccl_backend",
    "ShmBackend": "shm_backend",
    "Schedule": "schedules",
    "Transfer": "_mock_group",
    "check_schedule": "schedules",
    "create_comm_backend": "factory",
    "error_bound": "quantized",
    "explain_selection": "factory",
    "fused_all_reduce": "fusion",
    "register_c10d_backend": "c10d",
    "wrap_process_group": "c10d",
    "make_schedule": "schedules",
    "parse_algorithms": "choice",
    "run_schedule": "schedules",
}


def __getattr__(name: str) -> object:
    if name not in _NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(f".{_NEED_TORCH[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
