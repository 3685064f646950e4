"""Runs the detectors that are installed and collects what each of them says.

Detectors are plug-ins of entry-point group `sagellm.comm.topology.detectors`; this package ships
its own through the same door. They run in a daemon thread, so that one that hangs is left behind
at the deadline; one that raises becomes a warning.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from sagellm.core.protocols import (
    CommandResult,
    DetectionContext,
    Detector,
    DetectorSpec,
    TopologyFragment,
)

from . import _specs, _sysfs_net, _sysfs_numa, _sysfs_pci
from ._fragment_check import fault
from ._sysfs import Tree

if TYPE_CHECKING:
    from sagellm.core.protocols.registry import Registry

__all__ = ["BUILT_IN", "GROUP", "Detection", "installed_detectors", "make_context", "run_detectors"]

GROUP = "sagellm.comm.topology.detectors"

_HEAD_START_S = 0.05

BUILT_IN = (
    _specs.TOPO_FILE,
    _sysfs_pci.SPEC,
    _sysfs_numa.SPEC,
    _sysfs_net.SPEC,
    _specs.CXL,
    _specs.NVML,
    _specs.AMDSMI,
    _specs.KFD,
    _specs.NVIDIA_SMI,
    _specs.ROCM_SMI,
    _specs.HY_SMI,
    _specs.IXSMI,
    _specs.CNMON,
)
"""The detectors of this package."""


@dataclass(frozen=True, slots=True)
class Detection:
    """What the detectors gave.

    Attributes:
        fragments: Precedence and fragment of every detector that answered in time.
        warnings: Detectors that failed, hung or could not be imported.

    """

    fragments: tuple[tuple[int, TopologyFragment], ...]
    warnings: tuple[str, ...]


def installed_detectors() -> tuple[DetectorSpec, ...]:
    """The detectors of this environment, ours and plug-ins, by name."""
    return tuple(spec for _, spec in sorted(_registry().load_all().items()))


@cache
def _registry() -> Registry[DetectorSpec]:
    # Looking for plug-ins costs a quarter of what importing this package does.
    from sagellm.core.protocols.registry import Registry

    registry: Registry[DetectorSpec] = Registry(GROUP)
    for spec in BUILT_IN:
        registry.add(spec.name, spec)
    return registry


def make_context(
    *,
    root: Path | str = "/",
    environ: Mapping[str, str] | None = None,
    run: Callable[[Sequence[str], float], CommandResult] | None = None,
    clock: Callable[[], float] = time.monotonic,
    deadline_s: float = 1.0,
    allow_commands: bool = False,
) -> DetectionContext:
    """A context that looks at this machine, but for what is given.

    Args:
        root: Where `/sys` and `/proc` are looked for; a recorded tree stands in for a machine.
        environ: Environment variables; None is this process's, copied now.
        run: Runs command-line tools; None runs them on this machine.
        clock: Monotonic seconds.
        deadline_s: Seconds from now.
        allow_commands: Whether command-line tools may run. Without a `run` of its own a recorded
            machine runs none.

    """
    return DetectionContext(
        root=Path(root),
        environ=dict(os.environ) if environ is None else environ,
        run=run or _run_command,
        clock=clock,
        deadline_s=clock() + deadline_s,
        # A recorded machine is never mixed with what this machine's tools print.
        allow_commands=allow_commands and (run is not None or Path(root) == Path("/")),
    )


def run_detectors(specs: Iterable[DetectorSpec], ctx: DetectionContext) -> Detection:
    """What the detectors say, within the context's deadline. Never raises.

    Detectors that name vendors run after the others (or after half of the time, if one of those
    hangs), and only where one of these vendors' PCI devices was seen, or where the PCI tree could
    not be read at all. One that still hangs since an earlier call is not started again.
    """
    chosen = sorted(specs, key=lambda s: s.name)
    now_s = ctx.clock()
    runs = _start([s for s in chosen if not s.vendors], ctx, (now_s + ctx.deadline_s) / 2)
    answered = (r.fragment for r in runs if r.done.is_set() and r.fragment is not None)
    seen = _vendors(answered, Tree(ctx.root))
    wanted = [s for s in chosen if s.vendors and (seen is None or not seen.isdisjoint(s.vendors))]
    runs += _start(wanted, ctx, ctx.deadline_s)
    return _collect(runs, ctx)


# Containers may hide the PCI tree and still hand a device over.
_DEVICE_FILES = {
    "/dev/nvidiactl": "0x10de",
    "/dev/dxg": "0x10de",
    "/dev/kfd": "0x1002",
    "/dev/davinci_manager": "0x19e5",
    "/dev/cambricon_ctl": "0xcabc",
}


def _vendors(fragments: Iterable[TopologyFragment], tree: Tree) -> set[str] | None:
    """PCI vendors on this machine; None when nothing tells."""
    seen = {vendor for path, vendor in _DEVICE_FILES.items() if tree.exists(path)}
    for fragment in fragments:
        for device in fragment.devices:
            listed = device.attrs.get("pci_vendors") or device.attrs.get("pci_vendor") or ""
            seen.update(v for v in listed.split(",") if v)
    return seen or None


@dataclass(slots=True)
class _Run:
    """One detector at work in its thread."""

    spec: DetectorSpec
    done: threading.Event
    fragment: TopologyFragment | None = None
    failure: str | None = None
    detector: Detector | None = None
    started: bool = False
    started_s: float | None = None
    ended_s: float | None = None
    dropped: bool = False  # nobody waits for it any more


# Detectors that were left behind at a deadline, until they end: a driver that hangs once hangs
# again, and each new try would cost a thread.
_left_behind: dict[int, _Run] = {}  # by the identity of what loads them


def _start(specs: Sequence[DetectorSpec], ctx: DetectionContext, until_s: float) -> list[_Run]:
    """Run the detectors and wait until all are done or the clock says `until_s`."""
    runs = [_Run(spec, threading.Event()) for spec in specs]
    pending: deque[_Run] = deque()
    for run in runs:
        old = _left_behind.get(id(run.spec.load))
        if old is None or old.done.wait(_HEAD_START_S):
            _left_behind.pop(id(run.spec.load), None)
            pending.append(run)
        else:
            run.failure = "it still hangs since an earlier look, and is not started again"
            run.done.set()
    # Reads of small files fight over the interpreter's lock when they run side by side, so one
    # thread does all, and another goes on with the rest when a detector is plainly slow.
    stuck = True
    for run in runs:
        if stuck and pending:
            threading.Thread(target=_work, args=(pending, ctx), daemon=True).start()
        stuck = not run.done.wait(min(_HEAD_START_S, max(0.0, until_s - ctx.clock())))
    for run in runs:
        run.done.wait(max(0.0, until_s - ctx.clock()))
    return runs


def _collect(runs: Sequence[_Run], ctx: DetectionContext) -> Detection:
    """What the detectors gave; those that are not done at the deadline are left behind."""
    fragments: list[tuple[int, TopologyFragment]] = []
    warnings: list[str] = []
    for run in runs:
        if not run.done.wait(max(0.0, ctx.deadline_s - ctx.clock())):
            kept = _so_far(run, ctx)
            warnings.append(
                f"{run.spec.name} did not answer before the deadline; "
                + (f"{len(kept.devices)} devices it had read are kept" if kept.devices
                   else "left out")
            )  # fmt: skip
            if run.started:
                _left_behind[id(run.spec.load)] = run
            run.dropped = True
            fragments.append((run.spec.precedence, kept))
        elif run.fragment is not None:
            fragments.append((run.spec.precedence, run.fragment))
        else:
            warnings.append(f"{run.spec.name} failed: {run.failure}")
            fragments.append((run.spec.precedence, _nothing(run, ctx)))
    return Detection(tuple(fragments), tuple(warnings))


def _nothing(run: _Run, ctx: DetectionContext) -> TopologyFragment:
    """What a detector that failed leaves: the time that it took."""
    ended_s = ctx.clock() if run.ended_s is None else run.ended_s
    elapsed_s = 0.0 if run.started_s is None else ended_s - run.started_s
    return TopologyFragment(run.spec.name, elapsed_s=elapsed_s)


def _so_far(run: _Run, ctx: DetectionContext) -> TopologyFragment:
    """What a detector that still runs tells of by `so_far()`, where it has one."""
    nothing = _nothing(run, ctx)
    ask = getattr(run.detector, "so_far", None)
    if ask is None:
        return nothing
    try:
        found = ask()
    except Exception:  # a plug-in's bug must not take the topology with it
        return nothing
    return nothing if fault(found) else replace(found, elapsed_s=nothing.elapsed_s)


def _work(pending: deque[_Run], ctx: DetectionContext) -> None:
    while pending:
        try:
            run = pending.popleft()
        except IndexError:  # another thread was faster
            return
        if run.dropped:
            continue
        run.started = True
        threading.current_thread().name = f"topology-{run.spec.name}"
        _detect(run, ctx)


def _detect(run: _Run, ctx: DetectionContext) -> None:
    started_s = run.started_s = ctx.clock()
    try:
        run.detector = run.spec.load()
        fragment = run.detector.detect(ctx)
        wrong = fault(fragment)
        if wrong is None:
            run.fragment = replace(fragment, elapsed_s=ctx.clock() - started_s)
        run.failure = wrong
    except BaseException as e:  # a plug-in's bug must not take the topology with it
        run.failure = f"{type(e).__name__}: {e}"
    finally:
        run.ended_s = ctx.clock()
        run.done.set()


def _run_command(command: Sequence[str], timeout_s: float) -> CommandResult:
    from ._command import run_command  # costs milliseconds, and the default path runs none

    return run_command(command, timeout_s)
