"""The compiled engine as a library: finding it, and refusing one that is not what it should be."""

from __future__ import annotations

import ctypes
import functools
import logging
import struct
import threading
from dataclasses import dataclass
from pathlib import Path

from .choice import ALGORITHMS
from .layout import (
    CAUSES,
    CONTROL,
    CONTROL_BYTES,
    DTYPES,
    F_UNEVEN,
    H_POISON,
    MAX_RANKS,
    OPS,
    PAGE,
    REASON,
    REDUCTIONS,
    SIGNATURE,
    SYMMETRIC,
)

__all__ = ["ABI", "LIBRARY", "NativeLibrary", "library", "load"]

logger = logging.getLogger(__name__)

ABI = 3
"""What `sage_shm_abi` must answer."""
LIBRARY = Path(__file__).parent / "_sage_shm.so"
"""Where the wheel's build hook puts the library."""
LAYOUT = (
    *(ABI, PAGE, CONTROL, CONTROL_BYTES, H_POISON, REASON, MAX_RANKS, *SIGNATURE, *SYMMETRIC),
    *(F_UNEVEN, len(OPS), len(DTYPES), len(REDUCTIONS), len(ALGORITHMS), len(CAUSES)),
)
"""What `sage_shm_layout` must answer: numbers of `layout` and `choice` that `_native.c` repeats."""

_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_SIGNATURES = {
    "sage_shm_abi": (_I, []),
    "sage_shm_layout": (ctypes.POINTER(_L), []),
    "sage_shm_open": (_P, [_P, _I, _I, _L, _L, _L, _L, _P, _L, _I]),
    "sage_shm_tune": (None, [_P, _L, _L, _L, _L, _L]),
    "sage_shm_override": (_I, [_P, _L, _L, _L, _L]),
    "sage_shm_algorithm": (_I, [_P, _I, _L, _I]),
    "sage_shm_run": (_I, [_P, _L, _L, _P, _P, _P, _L]),
    "sage_shm_resume": (_I, [_P]),
    "sage_shm_prepare": (_P, [_P, _L, _L, _P, _P, _L]),
    "sage_shm_go": (_I, [_P]),
    "sage_shm_go_at": (_I, [_P, _P, _P, _L]),
    "sage_shm_forget": (None, [_P]),
    "sage_shm_failure": (None, [_P, _P]),
    "sage_shm_totals": (_L, [_P, _P, _L]),
    "sage_shm_records": (_L, [_P, _P]),
    "sage_shm_reset": (None, [_P]),
    "sage_shm_poison": (None, [_P, _I, ctypes.c_char_p]),
    "sage_shm_close": (_I, [_P]),
    "sage_shm_free": (None, [_P]),
    "sage_shm_load_acquire": (_L, [_P]),
    "sage_shm_store_release": (None, [_P, _L]),
    "sage_shm_fold": (None, [_I, _I, _I, _P, _P, _L]),
}


@dataclass(frozen=True, slots=True)
class NativeLibrary:
    """One library opened twice: `held` keeps the interpreter's lock, `free` lets it go."""

    held: ctypes.PyDLL
    free: ctypes.CDLL


def _check_whole(path: Path) -> None:
    """Refuse a file that ends before its section table: to map it would end the process."""
    with path.open("rb") as file:
        head = file.read(64)
    if len(head) < 64 or head[:5] != b"\x7fELF\x02":
        raise ValueError("it is no 64-bit ELF file")
    (table,) = struct.unpack_from("=Q", head, 40)
    entry_bytes, entries = struct.unpack_from("=HH", head, 58)
    need, has = table + entry_bytes * entries, path.stat().st_size
    if has < need:
        raise ValueError(f"it is cut short: {has} of {need} bytes")


def load(path: Path) -> NativeLibrary:
    """The library at `path`.

    Raises:
        OSError: It is absent, or for another machine.
        ValueError: It is cut short, or of another version than this module.

    """
    _check_whole(path)
    free = ctypes.CDLL(str(path))
    held = ctypes.PyDLL(str(path))
    try:
        for handle in (free, held):
            for name, (result, arguments) in _SIGNATURES.items():
                function = getattr(handle, name)
                function.restype, function.argtypes = result, arguments
    except AttributeError as e:
        raise ValueError(f"it lacks a function: {e}") from None
    abi = free.sage_shm_abi()
    if abi != ABI:
        raise ValueError(f"it is of another version: {abi}; this package has {ABI}")
    found = tuple(free.sage_shm_layout()[: len(LAYOUT)])
    if found != LAYOUT:
        raise ValueError(f"it has another layout: {found}; this package has {LAYOUT}")
    return NativeLibrary(held, free)


_once = threading.Lock()


@functools.cache
def _library(path: Path) -> NativeLibrary | str:
    if not path.exists():
        return f"{path.name} was not built: no C compiler was there when the wheel was made"
    try:
        return load(path)
    except (OSError, ValueError) as e:
        logger.warning(
            "the compiled engine of shm at %s is left out: %s; reinstall this package, or run "
            "python -m sagellm.comm.collective_ops._shm.build",
            path,
            e,
        )
        return str(e)


def library(path: Path | None = None) -> NativeLibrary | str:
    """The installed library, or why there is none; looked at once, a bad one logged once."""
    with _once:
        return _library(LIBRARY if path is None else path)
