"""What a topology detector gets and gives; detectors are plug-ins of the topology package.

Entry points of group `sagellm.comm.topology.detectors` give a `DetectorSpec`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from .topology import TopologyFragment

__all__ = ["CommandResult", "DetectionContext", "Detector", "DetectorSpec", "ask_tool"]

_LONGEST_SAYING = 120


@dataclass(frozen=True, slots=True)
class CommandResult:
    """What a vendor's tool printed. Trust neither code nor text alone."""

    returncode: int
    stdout: str
    stderr: str = ""

    @property
    def first_line(self) -> str:
        """The first line of the errors, else of the output, quoted; `nothing` without any."""
        lines = [x.strip() for x in (*self.stderr.splitlines(), *self.stdout.splitlines())]
        said = next((line for line in lines if line), None)
        return "nothing" if said is None else repr(said[:_LONGEST_SAYING])


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


def ask_tool(
    ctx: DetectionContext,
    tool: str,
    arguments: Sequence[str],
    warnings: list[str],
    *,
    places: Sequence[str] = (),
    longest_s: float = 10.0,
) -> CommandResult | None:
    """What a vendor's tool prints; None where there is none, it hangs or cannot be run.

    Never raises. Tools print errors on standard output and end with 0: the caller counts only
    what reads as an answer.

    Args:
        ctx: Where and how long to run it.
        tool: The command.
        arguments: What it is asked.
        warnings: Gets a sentence for each thing that went wrong; a missing tool is none.
        places: Where the command is when it is not on PATH, below the root.
        longest_s: Longest wait in seconds, where the deadline leaves that much.

    """
    for command in (tool, *(f"/{p}" for p in places if (ctx.root / p).is_file())):
        said = " ".join((command, *arguments))
        left_s = min(longest_s, ctx.deadline_s - ctx.clock())
        if left_s <= 0:
            warnings.append(f"no time left to run `{said}`")
            return None
        try:
            done = ctx.run([command, *arguments], left_s)
        except FileNotFoundError:
            continue
        except TimeoutError:
            warnings.append(f"`{said}` did not answer within {left_s:.1f} s")
            return None
        except OSError as e:
            warnings.append(f"`{said}` could not be run: {e}")
            return None
        if done.returncode != 0:
            warnings.append(f"`{said}` ended with {done.returncode}: {done.first_line}")
        return done
    return None
