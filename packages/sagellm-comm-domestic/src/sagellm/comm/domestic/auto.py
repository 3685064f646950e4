"""Which vendor `auto` means on this host, and why not the others."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sagellm.core.protocols import Probe
from sagellm.core.protocols.selection import BACKEND_SETTING

from .cuda_alias import classify_cuda, read_torch_build
from .detect import probe_vendor, sight
from .device_probe import probe_in_process
from .host import HostView
from .vendor_spec import VendorSpec
from .vendors import VENDORS, find_vendor

__all__ = ["VendorChoice", "choose_vendor"]


@dataclass(frozen=True, slots=True)
class VendorChoice:
    """The vendor taken, and what was found about every other.

    Attributes:
        row: The vendor, None when there is none here.
        reason: Why it was taken, or that none was.
        refused: Backend name to the reason it was not taken.

    """

    row: VendorSpec | None
    reason: str
    refused: Mapping[str, str] = field(default_factory=dict)

    def explain(self) -> str:
        """One line per candidate, the one taken first."""
        first = f"{self.row.backend}: {self.reason}" if self.row else self.reason
        return "\n".join([first, *(f"not {name}: {why}" for name, why in self.refused.items())])


def choose_vendor(
    view: HostView | None = None,
    *,
    probe: Callable[[VendorSpec], Probe] | None = probe_in_process,
) -> VendorChoice:
    """The vendor for this process, by the first of these that gives one.

    1. The setting `SAGELLM_COMM_BACKEND`.
    2. The library of a torch process group that is already initialised.
    3. A vendor's device that is already loaded into torch.
    4. Whose torch it is, when the device is called `cuda`.
    5. Installed plug-ins, those with a sign of a device first, each asked in a process of its own.

    Nothing is imported into this process, and no device is opened in it.

    Args:
        view: The host; None is this one.
        probe: Asks an installed plug-in for devices; None takes the cheap signs for an answer.

    Raises:
        ConfigError: The setting names no backend.

    """
    view = view or HostView.local()
    setting = view.environ.get(BACKEND_SETTING, "").strip()
    if setting and setting != "auto":
        row = find_vendor(setting)
        return VendorChoice(
            row, f"{BACKEND_SETTING} is {setting}", _others(row, f"{BACKEND_SETTING} is {setting}")
        )
    found = _by_process_group(view)
    if found is not None:
        return found
    refused: dict[str, str] = {}
    for row in VENDORS.values():
        running = sight(row, view).running
        if running:
            many = f"{running} device{'' if running == 1 else 's'}"
            reason = f"{row.module} is loaded in this process and has {many}"
            return VendorChoice(row, reason, _others(row, f"torch has {row.device} already"))
    for row in VENDORS.values():
        if row.dispatch == "cuda":
            answer = probe_vendor(row, view)
            if answer.available:
                return VendorChoice(row, answer.reason, {**refused, **_cuda_others(row, answer)})
            refused[row.backend] = f"{answer.reason}; {row.install_hint}"
    return _by_plugin(view, probe, refused)


def _others(taken: VendorSpec, why: str) -> dict[str, str]:
    return {name: why for name in VENDORS if name != taken.backend}


def _cuda_others(taken: VendorSpec, answer: Probe) -> dict[str, str]:
    return {
        name: f"torch belongs to {taken.title}: {answer.reason}"
        for name, row in VENDORS.items()
        if name != taken.backend and row.dispatch != "cuda"
    }


def _by_process_group(view: HostView) -> VendorChoice | None:
    if not view.loaded("torch"):
        return None
    distributed = getattr(sys.modules["torch"], "distributed", None)
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    from .groups import group_map

    served = group_map(distributed.group.WORLD)
    behind_cuda = classify_cuda(read_torch_build(view)).vendor if "cuda" in served else None
    for row in VENDORS.values():
        own = row.dispatch != "cuda" or row.vendor == behind_cuda
        if own and served.get(row.device) == row.c10d_name:
            reason = f"torch's default group is {row.device}:{row.c10d_name}"
            return VendorChoice(row, reason, _others(row, reason))
    return None


def _by_plugin(
    view: HostView, probe: Callable[[VendorSpec], Probe] | None, refused: dict[str, str]
) -> VendorChoice:
    installed: list[tuple[bool, VendorSpec, Probe]] = []
    for row in VENDORS.values():
        if row.dispatch == "cuda":
            continue
        answer = probe_vendor(row, view)
        if sight(row, view).plugin:
            installed.append((answer.available, row, answer))
        else:
            refused[row.backend] = f"{answer.reason}; {row.install_hint}"
    installed.sort(key=lambda entry: not entry[0])
    for index, (_, row, signs) in enumerate(installed):
        answer = signs if probe is None else probe(row)
        if answer.available:
            left = {
                other.backend: f"{row.backend} came first" for _, other, _ in installed[index + 1 :]
            }
            return VendorChoice(row, answer.reason, {**refused, **left})
        refused[row.backend] = answer.reason
    return VendorChoice(None, "no domestic accelerator can be used here", refused)
