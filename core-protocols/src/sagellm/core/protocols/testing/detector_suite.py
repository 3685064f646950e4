"""The contract of a topology `Detector`: it never raises, whatever the machine looks like."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from sagellm.core.protocols.detection import CommandResult, DetectionContext, Detector
from sagellm.core.protocols.topology import (
    DeviceKind,
    LinkKind,
    PathClass,
    TopologyFragment,
)

from .contract import Check, Report, run_local, select
from .targets import factory_of, name_of, resolve

__all__ = ["check_detector", "detector_checks"]

_BOUND_S = 5.0


@dataclass(frozen=True, slots=True)
class Detectors:
    """What a check gets: a factory of detectors."""

    make: Callable[[], Detector]


def _missing(command: Sequence[str], timeout_s: float) -> CommandResult:
    raise FileNotFoundError(command[0])


def _hanging(command: Sequence[str], timeout_s: float) -> CommandResult:
    raise TimeoutError(f"{command[0]} did not end in {timeout_s} s")


def _answering(code: int, text: str) -> Callable[[Sequence[str], float], CommandResult]:
    return lambda command, timeout_s: CommandResult(code, text, text)


def _context(
    root: Path,
    *,
    run: Callable[[Sequence[str], float], CommandResult] = _missing,
    environ: Mapping[str, str] | None = None,
    left_s: float = 2.0,
    allow_commands: bool = True,
) -> DetectionContext:
    return DetectionContext(
        root=root, environ=dict(environ or {}), run=run, clock=time.monotonic,
        deadline_s=time.monotonic() + left_s, allow_commands=allow_commands,
    )  # fmt: skip


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sagellm-root-") as name:
        yield Path(name)


def _sound(fragment: object, what: str) -> TopologyFragment:
    """The fragment, once its own rules hold."""
    if not isinstance(fragment, TopologyFragment):
        raise AssertionError(f"{what}: detect gave a {type(fragment).__name__}")
    if not fragment.source:
        raise AssertionError(f"{what}: the fragment does not say its source")
    ids = [d.id for d in fragment.devices]
    if len(set(ids)) != len(ids) or not all(ids):
        raise AssertionError(f"{what}: device ids repeat or are empty: {ids}")
    for device in fragment.devices:
        if device.kind not in get_args(DeviceKind):
            raise AssertionError(f"{what}: {device.id} is of unknown kind {device.kind!r}")
        if device.kind in ("gpu", "npu") and device.id.isdigit():
            raise AssertionError(f"{what}: {device.id!r} is an index, no stable id")
        if any(n < 0 for n in device.numa_nodes):
            raise AssertionError(f"{what}: {device.id} says NUMA node {device.numa_nodes}")
    for link in fragment.links:
        if link.kind not in get_args(LinkKind) or link.a == link.b or link.count < 1:
            raise AssertionError(f"{what}: a link makes no sense: {link}")
        speed = link.bandwidth_bytes_per_s
        if speed is not None and not speed > 0:
            raise AssertionError(f"{what}: an unknown speed is None, not {speed}: {link}")
    for pair in fragment.pairs:
        if pair.a == pair.b or (pair.path is None and pair.via is None and not pair.peer):
            raise AssertionError(f"{what}: a pair says nothing: {pair}")
        if pair.path is not None and pair.path not in get_args(PathClass):
            raise AssertionError(f"{what}: a pair is of unknown class: {pair}")
    if not all(isinstance(w, str) and w for w in fragment.warnings):
        raise AssertionError(f"{what}: warnings are {fragment.warnings!r}")
    return fragment


def _bare(d: Detectors) -> None:
    with _folder() as root:
        found = _sound(d.make().detect(_context(root)), "an empty machine")
        gone = _sound(d.make().detect(_context(root / "gone")), "a root that does not exist")
    for what, fragment in (("an empty machine", found), ("a missing root", gone)):
        seen = [v.id for v in fragment.devices if v.kind in ("gpu", "npu")]
        if seen:
            raise AssertionError(f"{what} has accelerators {seen}: the root was not respected")


def _broken(d: Detectors) -> None:
    """Files of the wrong kind, empty, binary, and not readable."""
    with _folder() as root:
        pci = root / "sys/bus/pci/devices/0000:17:00.0"
        pci.mkdir(parents=True)
        (pci / "vendor").write_bytes(b"\xff\xfe\x00rubbish")
        (pci / "device").write_text("")
        (pci / "class").write_text("0x03zz")
        (pci / "numa_node").write_text("-1\n")
        (pci / "max_link_speed").write_text("Unknown")
        (pci / "max_link_width").mkdir()
        node = root / "sys/devices/system/node/node0"
        node.mkdir(parents=True)
        (node / "cpulist").write_text("0-")
        (node / "distance").write_text("a b")
        (node / "meminfo").write_text("nothing")
        for name in ("net/eth0", "infiniband/mlx5_0/ports/1"):
            (root / "sys/class" / name).mkdir(parents=True)
        (root / "sys/class/net/eth0/speed").write_text("-1")
        (root / "sys/class/infiniband/mlx5_0/ports/1/rate").write_text("fast")
        (root / "proc").mkdir()
        (root / "proc/cpuinfo").write_bytes(b"\x80\x81")
        _sound(d.make().detect(_context(root)), "a machine with broken files")


def _tools(d: Detectors) -> None:
    answers = {
        "a tool that hangs": _hanging,
        "a tool that fails": _answering(255, "error: no devices were found"),
        "a tool that prints nothing": _answering(0, ""),
        "a tool that prints rubbish": _answering(0, "\x00\t[N/A] || ---\n" * 50),
        "a tool that prints half a table": _answering(0, "        GPU0    GPU1\nGPU0     X \nGPU1"),
        "a tool that prints half of JSON": _answering(0, '{"devices": [{"id": '),
    }
    with _folder() as root:
        for what, run in answers.items():
            _sound(d.make().detect(_context(root, run=run)), what)


def _no_commands(d: Detectors) -> None:
    called: list[Sequence[str]] = []

    def run(command: Sequence[str], timeout_s: float) -> CommandResult:
        called.append(command)
        raise FileNotFoundError(command[0])

    with _folder() as root:
        _sound(d.make().detect(_context(root, run=run, allow_commands=False)), "without commands")
    if called:
        raise AssertionError(f"commands were run although they are not allowed: {called}")


def _deadline(d: Detectors) -> None:
    started = time.monotonic()
    _sound(d.make().detect(_context(Path("/"), left_s=-1.0)), "a deadline that is over")
    took = time.monotonic() - started
    if took > _BOUND_S:
        raise AssertionError(f"with its deadline over, detect took {took:.1f} s")


def _environment(d: Detectors) -> None:
    odd = {"CUDA_VISIBLE_DEVICES": "x,,99", "ASCEND_RT_VISIBLE_DEVICES": "-1", "PATH": ""}
    with _folder() as root:
        _sound(d.make().detect(_context(root, environ=odd)), "with odd variables")


def _repeatable(d: Detectors) -> None:
    detector = d.make()
    fragments = [_sound(detector.detect(_context(Path("/"))), "this machine") for _ in range(2)]
    first, second = ([v.id for v in f.devices] for f in fragments)
    if first != second:
        raise AssertionError(f"devices differ between two calls: {first} and {second}")


def detector_checks() -> list[Check]:
    """Every check of the suite, in a stable order."""
    return [
        Check("an empty machine", _bare),
        Check("a machine with broken files", _broken),
        Check("tools that fail", _tools),
        Check("no tool is run unless allowed", _no_commands),
        Check("a deadline that is over", _deadline),
        Check("odd environment variables", _environment),
        Check("two calls agree", _repeatable),
    ]


def check_detector(
    target: object, *, only: Sequence[str] = (), timeout_s: float | None = None
) -> Report:
    """Run the suite on a detector.

    Args:
        target: `module:attribute`, the name of an entry point, or the class, function or spec.
        only: Patterns of checks' names; empty runs all.
        timeout_s: Longest time for one check; None is the check's own.

    """
    argument = Detectors(factory_of(resolve("detector", target)))
    return run_local(
        "detector", name_of(target), select(detector_checks(), only), argument, timeout_s=timeout_s
    )
