"""Which backend `auto` means, decided alike on every rank and explained."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import pydantic

from ._process_group.transport import TorchObject
from .backend_spec import BackendSpec
from .config import Settings
from .errors import (
    BackendUnavailableError,
    CollectiveMismatchError,
    CommTimeoutError,
    ConfigError,
    DistributedRuntimeError,
)
from .registry import Registry

__all__ = [
    "BACKENDS_GROUP",
    "BACKEND_SETTING",
    "Selection",
    "SelectionSettings",
    "backend_registry",
    "select_backend",
]

BACKENDS_GROUP = "sagellm.comm.backends"
"""Entry-point group of `BackendSpec`s."""
BACKEND_SETTING = "SAGELLM_COMM_BACKEND"
"""Environment variable of `SelectionSettings.backend`: a name, by default `auto`."""

_OURS = "pip install sagellm-comm-collective-ops"
_DOMESTIC = "pip install sagellm-comm-domestic"
_HINTS = {
    **dict.fromkeys(("gloo", "hier", "mock", "nccl", "rccl", "shm"), _OURS),
    **dict.fromkeys(
        (
            "bccl",
            "cncl",
            "eccl",
            "hccl",
            "hygon",
            "iluvatar",
            "kunlun",
            "mccl",
            "metax",
            "sccl",
            "tccl",
        ),
        _DOMESTIC,
    ),
}


class SelectionSettings(Settings, package="selection"):
    """Section `selection` of the configuration.

    Attributes:
        backend: Name of the backend that `auto` stands for; `auto` leaves the choice open. Its
            variable is SAGELLM_COMM_BACKEND, which wins over SAGELLM_COMM_SELECTION_BACKEND.

    """

    env_names: ClassVar[Mapping[str, str]] = {BACKEND_SETTING: "backend"}

    backend: Annotated[
        str, pydantic.AfterValidator(lambda name: name.strip().lower() or "auto")
    ] = "auto"


def backend_registry() -> Registry[BackendSpec]:
    """The installed backends, with the line that brings each of the absent ones."""
    return Registry(BACKENDS_GROUP, install_hints=_HINTS)


@dataclass(frozen=True, slots=True)
class Selection:
    """The backend chosen, and what became of every other candidate.

    Attributes:
        spec: The chosen backend.
        reason: One sentence.
        rejected: The other candidates by name, and why each was not taken.
        device_type: Device type it was chosen for.

    """

    spec: BackendSpec
    reason: str
    rejected: Mapping[str, str] = field(default_factory=dict)
    device_type: str = "cpu"

    def explain(self) -> str:
        """One line per candidate, the chosen one first."""
        lines = [f"{self.spec.name}: taken for {self.device_type}: {self.reason}"]
        lines += [f"{name}: not taken: {why}" for name, why in sorted(self.rejected.items())]
        return "\n".join(lines)


def select_backend(
    device_type: str | None = None,
    *,
    group: TorchObject = None,
    store: TorchObject = None,
    rank: int = 0,
    size: int = 1,
    candidates: Registry[BackendSpec] | None = None,
    timeout_s: float = 30.0,
    setting: str | None = None,
) -> Selection:
    """The backend that `auto` stands for; the same answer on every rank, or an error.

    In this order: `setting` or the configuration's (SAGELLM_COMM_BACKEND); the library of `group`
    or of the initialised default group; a device that is present, by priority; the CPU's fastest.
    A spec of negative priority is taken only by name. With more than one rank the answers are
    exchanged over `store`, and every rank must make this call.

    Args:
        device_type: Restrict the choice to backends of this torch device type.
        group: A process group whose library is to be kept.
        store: Where ranks exchange their answers; needed when `size` is above 1.
        rank: This process's rank among those that choose.
        size: How many choose.
        candidates: Where backends come from; None is the installed ones.
        timeout_s: Longest wait for the other ranks.
        setting: A backend's name; None reads `SelectionSettings`, `auto` leaves the choice open.

    Raises:
        ConfigError: An unknown name, or several ranks without a store.
        BackendUnavailableError: Nothing that fits can run here; the message says why for each.
        CollectiveMismatchError: Ranks would choose differently; the message names them.
        CommTimeoutError: Some ranks did not answer; the message names them.

    """
    registry = backend_registry() if candidates is None else candidates
    try:
        named = SelectionSettings.load().backend if setting is None else setting
        chosen = _choose(registry, device_type, group, named.strip().lower())
    except (ConfigError, BackendUnavailableError) as e:
        # The others must learn of it, or they would wait for this rank until their deadline.
        if size > 1 and store is not None:
            _exchange(store, rank, size, {"error": str(e)}, timeout_s)
        raise
    if size > 1:
        if store is None:
            raise ConfigError(f"{size} ranks choose a backend: pass the store they share")
        _agree(store, rank, size, chosen, timeout_s)
    return chosen


def _choose(
    registry: Registry[BackendSpec],
    device_type: str | None,
    group: TorchObject,
    named: str,
) -> Selection:
    if named not in ("", "auto"):
        return _named(registry.load(named), device_type, named)
    specs = registry.load_all()
    rejected = {name: f"its plug-in is broken: {why}" for name, why in registry.broken().items()}
    libraries = _libraries(group)
    usable: list[BackendSpec] = []
    why: dict[str, str] = {}
    for name, spec in specs.items():
        refusal, why[name] = _refuse(spec, device_type, libraries)
        if refusal:
            rejected[name] = why[name]
        else:
            usable.append(spec)
    if not usable:
        details = "; ".join(f"{name}: {text}" for name, text in sorted(rejected.items()))
        where = f" for {device_type}" if device_type else ""
        raise BackendUnavailableError(
            f"no backend{where} can run here: {details or 'none is installed; ' + _OURS}"
        )
    # A device before the CPU, then the higher priority; the name makes ties the same everywhere.
    usable.sort(key=lambda s: (_kind(s, device_type, libraries) == "cpu", -s.priority, s.name))
    best = usable[0]
    for spec in usable[1:]:
        rejected[spec.name] = f"{best.name} comes first ({why[spec.name]})"
    kind = _kind(best, device_type, libraries)
    if libraries:
        reason = f"the process group already runs {best.c10d_name}; {why[best.name]}"
    elif kind == "cpu":
        reason = f"highest priority on the CPU, no device was found; {why[best.name]}"
    else:
        reason = f"{kind} is present; {why[best.name]}"
    return Selection(best, reason, rejected, kind)


def _named(spec: BackendSpec, device_type: str | None, named: str) -> Selection:
    if device_type is not None and device_type not in spec.device_types:
        served = ", ".join(spec.device_types)
        raise ConfigError(f"backend {named!r} serves {served}, not {device_type}")
    probe = spec.probe()
    if not probe.available:
        hint = f"; {spec.install_hint}" if spec.install_hint else ""
        raise BackendUnavailableError(f"backend {named!r} was asked for: {probe.reason}{hint}")
    return Selection(spec, f"asked for by name; {probe.reason}", {}, _kind(spec, device_type, {}))


def _kind(spec: BackendSpec, device_type: str | None, libraries: Mapping[str, str]) -> str:
    """The device type the spec would be used for."""
    if device_type is not None:
        return device_type
    for kind in spec.device_types:
        if libraries.get(kind) == spec.c10d_name is not None:
            return kind
    return spec.device_types[0]


def _refuse(
    spec: BackendSpec, device_type: str | None, libraries: Mapping[str, str]
) -> tuple[bool, str]:
    """Whether `auto` passes the spec over, and why; or what its probe found."""
    if spec.priority < 0:
        return True, "taken only by name"
    if device_type is not None and device_type not in spec.device_types:
        return True, f"serves {', '.join(spec.device_types)}, not {device_type}"
    if libraries:
        kinds = [k for k in spec.device_types if libraries.get(k) == spec.c10d_name is not None]
        if not kinds:
            running = ", ".join(f"{lib} on {kind}" for kind, lib in sorted(libraries.items()))
            return True, f"the process group runs {running}"
    try:
        probe = spec.probe()
    except Exception as e:  # a vendor's probe may fail in any way it likes
        return True, f"its probe failed: {type(e).__name__}: {e}"
    if not probe.available:
        hint = f"; {spec.install_hint}" if spec.install_hint else ""
        return True, probe.reason + hint
    return False, probe.reason


def _libraries(group: TorchObject) -> dict[str, str]:
    """Library per device type of `group` or of the default group; empty without one."""
    if group is None and "torch" not in sys.modules:
        return {}
    from ._process_group.shim import group_libraries

    return group_libraries(group)


def _agree(store: TorchObject, rank: int, size: int, ours: Selection, timeout_s: float) -> None:
    answer = {"name": ours.spec.name, "device": ours.device_type, "why": ours.reason}
    answers = _exchange(store, rank, size, answer, timeout_s)
    failed = {r: a["error"] for r, a in answers.items() if "error" in a}
    if failed:
        text = "; ".join(f"rank {r}: {why}" for r, why in sorted(failed.items()))
        raise BackendUnavailableError(f"ranks cannot choose a backend: {text}")
    if len({(a["name"], a["device"]) for a in answers.values()}) > 1:
        calls = {r: f"{a['name']} on {a['device']} ({a['why']})" for r, a in answers.items()}
        text = "; ".join(f"rank {r}: {call}" for r, call in sorted(calls.items()))
        raise CollectiveMismatchError(
            f"ranks choose different backends: {text}; set {BACKEND_SETTING} alike on all, "
            f"or bring the missing library to the ranks that lack it",
            calls=calls,
        )


def _exchange(
    store: TorchObject, rank: int, size: int, answer: dict[str, str], timeout_s: float
) -> dict[int, dict[str, str]]:
    """Every rank's answer. A counter per rank keeps one exchange apart from the next."""
    try:
        turn = store.add(f"sagellm/select/turn/{rank}", 1)
        keys = {r: f"sagellm/select/{turn}/{r}" for r in range(size)}
        store.set(keys[rank], json.dumps(answer))
        end = time.monotonic() + timeout_s
        pause_s = 0.001
        while True:
            missing = [r for r, key in keys.items() if not store.check([key])]
            if not missing:
                break
            if time.monotonic() >= end:
                raise CommTimeoutError(
                    f"ranks {missing} of {size} chose no backend within {timeout_s} s"
                )
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, 0.05)
        return {r: json.loads(store.get(key)) for r, key in keys.items()}
    except RuntimeError as e:  # torch's store errors, all of them RuntimeError
        raise DistributedRuntimeError(f"the store shared by {size} ranks failed: {e}") from e
