"""Bring a vendor's device into torch, or say exactly what is missing.

A plug-in without its runtime fails in many ways: an ImportError that names a shared library, a
plain Exception about an unset variable, or a torch that cannot be imported at all because the
plug-in is loaded by torch itself. All become `BackendUnavailableError`, chained to the cause.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import sys
import threading
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any, TypeAlias

from sagellm.core.protocols import BackendUnavailableError

from .cuda_alias import classify_cuda, read_torch_build
from .host import HostView
from .vendor_spec import VendorSpec

__all__ = ["VendorRuntime", "import_torch", "load_vendor", "missing_piece", "unavailable"]

logger = logging.getLogger(__name__)

_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
_LIBRARY = re.compile(r"\b(lib[\w+-]+)\.so[\w.]*")
_lock = threading.RLock()

_Module: TypeAlias = Any
"""torch, or its device module of a vendor: the attributes used here have no stubs."""


@dataclass(frozen=True, slots=True)
class VendorRuntime:
    """A vendor's device, ready in this process.

    Attributes:
        row: The vendor.
        plugin: The imported plug-in, None where torch has the device built in.
        device_module: `torch.npu` and its like.
        device_count: Devices this process sees, at least 1.

    """

    row: VendorSpec
    plugin: ModuleType | None
    device_module: _Module
    device_count: int


def import_torch() -> ModuleType:
    """Torch, imported even when a plug-in that it would load by itself cannot be.

    With autoload on, one broken plug-in makes `import torch` fail, and with it every other
    backend. So torch is imported without autoload and the plug-ins are then loaded one by one; a
    failure is logged, and raised only by `load_vendor` of that vendor.

    Raises:
        BackendUnavailableError: torch itself is missing or broken.

    """
    with _lock:
        if "torch" in sys.modules:
            return sys.modules["torch"]
        before = os.environ.get(_AUTOLOAD)
        os.environ[_AUTOLOAD] = "0"
        try:
            torch = importlib.import_module("torch")
        except Exception as e:
            raise BackendUnavailableError(
                f"import torch failed: {type(e).__name__}: {e}; domestic backends need torch >= 2.6"
            ) from e
        finally:
            _restore(before)
        if before != "0":
            _autoload()
            _restore(before)
        return torch


def _restore(before: str | None) -> None:
    if before is None:
        os.environ.pop(_AUTOLOAD, None)
    else:
        os.environ[_AUTOLOAD] = before


def _autoload() -> None:
    for entry in entry_points(group="torch.backends"):
        try:
            entry.load()()
        except Exception as e:  # a plug-in may fail in any way it likes
            logger.warning("torch's plug-in %s failed to load: %s", entry.name, e)


def load_vendor(row: VendorSpec, view: HostView | None = None) -> VendorRuntime:
    """The vendor's device in this process; its plug-in is imported if it was not.

    Thread-safe. Only one vendor with a device type of its own can live in a process.

    Raises:
        BackendUnavailableError: The plug-in, its runtime, a device or the collective library is
            missing; the message names which and the next step, and the cause is chained.

    """
    with _lock:
        torch = import_torch()
        if row.dispatch == "cuda":
            split = classify_cuda(read_torch_build(view or HostView.local()))
            if split.vendor != row.vendor:
                owner = split.vendor or "no vendor"
                text = f"this torch belongs to {owner}: {split.reason}"
                raise BackendUnavailableError(f"{_who(row)}: {text}; {row.install_hint}")
        plugin = _import_plugin(row)
        device_module = _device_module(row, torch)
        count = _count(row, device_module)
        _check_library(row, torch)
        return VendorRuntime(row, plugin, device_module, count)


def _who(row: VendorSpec) -> str:
    return f"{row.backend!r} ({row.title}, {row.library})"


def _import_plugin(row: VendorSpec) -> ModuleType | None:
    if row.module is None:
        return None
    try:
        return importlib.import_module(row.module)
    except Exception as e:  # ImportError, RuntimeError and plain Exception have been seen
        raise unavailable(row, f"import {row.module}", e) from e


def _device_module(row: VendorSpec, torch: _Module) -> _Module:
    if row.dispatch == "privateuse1":
        taken = torch._C._get_privateuse1_backend_name()
        if taken != row.device:
            holder = "nobody" if taken == "privateuseone" else f"{taken!r}"
            raise BackendUnavailableError(
                f"{_who(row)}: {row.module} was imported, but torch has no device {row.device!r}: "
                f"the one slot for such devices is held by {holder}; use a process of its own, "
                f"and a {row.module} made for torch {torch.__version__}"
            )
    module = getattr(torch, row.device, None)
    if module is None:
        raise BackendUnavailableError(
            f"{_who(row)}: torch.{row.device} is missing although {row.module} was imported; "
            f"use a {row.module} made for torch {torch.__version__}"
        )
    return module


def _count(row: VendorSpec, device_module: _Module) -> int:
    try:
        count = int(device_module.device_count()) if device_module.is_available() else 0
    except Exception as e:  # a driver may fail in any way it likes
        raise unavailable(row, f"torch.{row.device}.is_available()", e) from e
    if count > 0:
        return count
    hidden = [f"{v}={os.environ[v]!r}" for v in row.visible_env if v in os.environ]
    hint = f"; {', '.join(hidden)} may hide it" if hidden else ""
    looked = ", ".join(f"/{p}" for p in row.device_nodes) or "its driver"
    raise BackendUnavailableError(
        f"{_who(row)}: the runtime is here but sees no {row.device} device{hint}; look for {looked}"
        + (f" and ask `{row.tool}`" if row.tool else "")
    )


def _check_library(row: VendorSpec, torch: _Module) -> None:
    distributed = torch.distributed
    if not distributed.is_available():
        raise BackendUnavailableError(f"{_who(row)}: this torch is built without distributed")
    known = distributed.Backend.backend_list
    if row.c10d_name not in known:
        raise BackendUnavailableError(
            f"{_who(row)}: torch.distributed knows no {row.c10d_name!r}, only {', '.join(known)}; "
            f"{row.install_hint}"
        )


def missing_piece(row: VendorSpec, text: str) -> tuple[str, str] | None:
    """The library or variable that an error text says is missing, and what to do about it."""
    for name in _LIBRARY.findall(text):
        for known, hint in row.libraries.items():
            if name == known:
                return f"{name}.so", hint
    for known, hint in row.libraries.items():
        if known in text:
            return known, hint
    found = _LIBRARY.search(text)
    if found:
        return found.group(0), f"put its directory in LD_LIBRARY_PATH, or {row.install_hint}"
    if "Two accelerators" in text:
        return "one accelerator", f"use a CPU build of torch, or set {_AUTOLOAD}=0"
    return None


def unavailable(row: VendorSpec, step: str, error: BaseException) -> BackendUnavailableError:
    """The error for a failed step: who, which step, what is missing and what to do next."""
    texts: list[str] = []
    link: BaseException | None = error
    while link is not None and len(texts) < 8:
        texts.append(f"{type(link).__name__}: {link}")
        link = link.__cause__ or link.__context__
    text = f"{_who(row)}: {step} failed: {texts[0]}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        if error.name == row.module:
            return BackendUnavailableError(
                f"{_who(row)}: the plug-in {row.module} is not installed; {row.install_hint}"
            )
        return BackendUnavailableError(f"{text}; module {error.name} is missing too; install it")
    piece = missing_piece(row, " | ".join(texts))
    if piece is None:
        return BackendUnavailableError(f"{text}; {row.install_hint}")
    return BackendUnavailableError(f"{text}; {piece[0]} is missing: {piece[1]}")
