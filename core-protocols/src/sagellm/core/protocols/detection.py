"""What a topology detector gets and gives; detectors are plug-ins of the topology package.

Entry points of group `sagellm.comm.topology.detectors` give a `DetectorSpec`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from .topology import TopologyFragment

__all__ = ["CommandResult", "DetectionContext", "Detector", "DetectorSpec"]


@dataclass(frozen=True, slots=True)
class CommandResult:
    """What a vendor's tool printed. Trust neither code nor text alone."""

    returncode: int
    stdout: str
    stderr: str = ""


@dataclass(frozen=True, slots=True)
class DetectionContext:
    """Everything a detector may look at, so that a recorded machine can stand in for this one.

    Attributes:
        root: Where `/sys`, `/proc` and `/dev` are looked for.
        environ: Environment variables.
        run: Runs a command with a timeout in seconds; raises FileNotFoundError when there is
            no such tool and TimeoutError when it hangs.
        clock: Monotonic seconds.
        deadline_s: Value of `clock` by which the detector must be done.
        allow_commands: Whether command-line tools may be run; they cost 0.3-2 s each.

    """

    root: Path
    environ: Mapping[str, str]
    run: Callable[[Sequence[str], float], CommandResult]
    clock: Callable[[], float]
    deadline_s: float
    allow_commands: bool = False


class Detector(Protocol):
    """Reads one source. Never raises: what cannot be read becomes a warning in the fragment."""

    def detect(self, ctx: DetectionContext) -> TopologyFragment:
        """What this source says, within `ctx.deadline_s`. Thread-safe, without side effects."""
        ...


@dataclass(frozen=True, slots=True)
class DetectorSpec:
    """One detector of the plug-in group.

    Attributes:
        name: `sysfs`, `nvml`, `npu-smi`, ….
        precedence: On conflict the higher wins: user file 100, driver library 80, sysfs 60,
            command-line tool 40, inference 20.
        load: Returns the detector.
        vendors: PCI vendor ids (`0x10de`) whose presence makes it worth running; empty always.

    """

    name: str
    precedence: int
    load: Callable[[], Detector]
    vendors: tuple[str, ...] = field(default_factory=tuple)
