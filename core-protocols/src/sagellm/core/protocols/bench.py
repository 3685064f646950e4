"""The harness of every benchmark: contenders interleaved in one run, and honest figures.

A benchmark is a module with cases, contenders and ratios:

    def contenders(case):                       # name -> a call that returns seconds
        return {"ours": lambda: run(case), "peer": Missing("pip install peer")}

    def ratios(rows):                           # bigger is better
        return [Ratio("peer/ours", row.case, …, goal=1.0) for row in rows …]

    main = Benchmark("copy", contenders, cases=[{"nbytes": 1024}], ratios=ratios).main

    if __name__ == "__main__":
        raise SystemExit(main())

`python -m that.module [--quick] [--json F] [--markdown F] [--launches N]` starts each launch in
a process of its own. In a launch every contender is warmed up, and then each repetition runs
all of them in a fresh random order, so that a machine that drifts drifts for all alike.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ._bench_report import (
    SCHEMA as SCHEMA,
    commit_of,
    hardware,
    markdown as markdown,
    summary,
    validate as validate,
    versions,
)
from .errors import CommError, ConfigError, DistributedRuntimeError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

__all__ = [
    "SCHEMA", "Benchmark", "Missing", "Ratio", "Row", "end_processes", "markdown", "validate",
]  # fmt: skip

Case: TypeAlias = Mapping[str, Any]  # Any: plain JSON values that name the case


@dataclass(frozen=True, slots=True)
class Missing:
    """Stands for a contender that cannot run here; its column stays empty, with the reason."""

    reason: str


Contender: TypeAlias = Callable[[], float | None] | Missing
"""Returns its figure, seconds by default; None has the harness time the call itself."""

Contenders: TypeAlias = Mapping[str, Contender]


@dataclass(frozen=True, slots=True)
class Row:
    """Samples of one contender in one case of one launch.

    Attributes:
        case: The case.
        contender: Name of the contender.
        samples: In the order they were taken; empty for a missing contender.
        missing: Why it is missing; empty otherwise.

    """

    case: Case
    contender: str
    samples: tuple[float, ...] = ()
    missing: str = ""

    @property
    def median(self) -> float | None:
        """Median of the samples, None without any."""
        return statistics.median(self.samples) if self.samples else None


@dataclass(frozen=True, slots=True)
class Ratio:
    """One figure to judge by, so that bigger is better.

    Attributes:
        name: What is compared, such as `gloo/shm`.
        case: Where.
        value: None when a side is missing.
        goal: What it should reach; None when nothing is promised.

    """

    name: str
    case: Case
    value: float | None
    goal: float | None = None


@dataclass
class Benchmark:
    """One benchmark; `main` is its command line.

    Attributes:
        name: Goes into the report as `bench`.
        contenders: Called once per case and launch; the calls it returns by name, or a context
            manager that gives them and cleans up at its end.
        cases: What to measure, or a function of `quick` that says so.
        ratios: Figures to judge by, from the rows of one launch.
        metric: What a contender returns.
        unit: Its unit: `s`, `bytes_per_s`, `ratio`, ….
        better: Which end is good; decides which launch is the worst.
        repeats: Samples per contender, case and launch; at least 5.
        warmup: Calls of each contender before that.
        launches: Processes; at least 3 unless `--quick`.
        distributions: Further distributions whose versions belong in the report.
        launch_timeout_s: A launch that takes longer is killed and fails the benchmark.

    """

    name: str
    contenders: Callable[[Case], Contenders | AbstractContextManager[Contenders]]
    cases: Sequence[Case] | Callable[[bool], Sequence[Case]] = field(default_factory=lambda: [{}])
    ratios: Callable[[Sequence[Row]], Iterable[Ratio]] = lambda rows: ()
    metric: str = "time"
    unit: str = "s"
    better: Literal["lower", "higher"] = "lower"
    repeats: int = 7
    warmup: int = 2
    launches: int = 3
    distributions: Sequence[str] = ()
    launch_timeout_s: float = 1800.0

    def __post_init__(self) -> None:
        if self.repeats < 5 or self.launches < 1 or self.warmup < 0:
            raise ConfigError(
                f"benchmark {self.name!r} needs at least 5 repeats and 1 launch, not "
                f"{self.repeats} and {self.launches}"
            )

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Run the benchmark as its command line says; the exit code.

        Exit code 0 means measured, whatever the figures; 1 that a launch failed.
        """
        parser = argparse.ArgumentParser(description=f"Benchmark {self.name}.")
        parser.add_argument("--quick", action="store_true", help="one launch, few repeats")
        parser.add_argument("--json", metavar="FILE", help="write the report here")
        parser.add_argument("--markdown", metavar="FILE", help="write its tables here")
        parser.add_argument("--launches", type=int, help="processes (default: 3, quick: 1)")
        parser.add_argument("--repeats", type=int, help="samples per contender and launch")
        parser.add_argument("--seed", type=int, default=0, help="of the random order")
        parser.add_argument(
            "--priority", action="store_true",
            help="ask for real-time priority, for all contenders alike; for a busy machine",
        )  # fmt: skip
        parser.add_argument("--one-launch", metavar="FILE", help=argparse.SUPPRESS)
        options = parser.parse_args(argv)
        if options.launches is not None and options.launches < 1:
            parser.error(f"--launches {options.launches} is not positive")
        if options.repeats is not None and options.repeats < 5:
            parser.error(f"--repeats {options.repeats}: medians need at least 5")
        if options.one_launch:
            rows = self.launch(
                quick=options.quick, repeats=options.repeats, seed=options.seed,
                priority=options.priority,
            )  # fmt: skip
            Path(options.one_launch).write_text(json.dumps(rows))
            return 0
        try:
            report = self._run(options)
        except CommError as e:
            sys.stderr.write(f"{self.name}: {e}\n")
            return 1
        text = markdown(report)
        if options.json:
            Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
        if options.markdown:
            Path(options.markdown).write_text(text)
        sys.stdout.write(text)
        return 0

    def launch(
        self, *, quick: bool, repeats: int | None = None, seed: int = 0, priority: bool = False
    ) -> dict[str, Any]:  # Any: JSON
        """Measure every case once in this process; rows, ratios and where that was."""
        scheduling = _boost() if priority else "default"
        repeats = repeats or (5 if quick else self.repeats)
        rows: list[Row] = []
        for case in self.cases(quick) if callable(self.cases) else self.cases:
            made = self.contenders(case)
            with contextlib.ExitStack() as stack:
                named = made if isinstance(made, Mapping) else stack.enter_context(made)
                rows += _measure(case, named, repeats, self.warmup, random.Random(seed))
        return {
            "hardware": hardware(scheduling),
            "rows": [dataclasses.asdict(row) for row in rows],
            "ratios": [dataclasses.asdict(ratio) for ratio in self.ratios(rows)],
        }

    def _run(self, options: argparse.Namespace) -> dict[str, Any]:
        module, command = self._command()
        source = Path(sys.modules[self.contenders.__module__].__file__ or ".")
        launches = options.launches or (1 if options.quick else self.launches)
        arguments = ["--quick"] if options.quick else []
        arguments += ["--repeats", str(options.repeats)] if options.repeats else []
        arguments += ["--priority"] if options.priority else []
        results = []
        with tempfile.TemporaryDirectory(prefix="sagellm-bench-") as folder:
            for i in range(launches):
                file = Path(folder) / f"launch-{i}.json"
                seed = ["--seed", str(options.seed + i), "--one-launch", str(file)]
                _start([*module, *arguments, *seed], i, self.launch_timeout_s)
                results.append(json.loads(file.read_text()))
        shown = [command, *arguments, "--launches", str(launches), "--seed", str(options.seed)]
        report = {
            "schema": SCHEMA,
            "bench": self.name,
            "quick": options.quick,
            "launches": launches,
            "hardware": results[0]["hardware"],
            "versions": versions(self.distributions),
            "commit": commit_of(source.parent),
            "command": " ".join(shown),
            "rows": self._rows(results),
            "ratios": _ratios(results),
        }
        validate(report)
        return report

    def _command(self) -> tuple[list[str], str]:
        """How to start this benchmark again, and how to write that down."""
        name = self.contenders.__module__
        if name == "__main__":
            spec = sys.modules["__main__"].__spec__
            if spec is None:
                file = sys.modules["__main__"].__file__ or ""
                return [sys.executable, file], f"python {Path(file).name}"
            name = spec.name
        return [sys.executable, "-m", name], f"python -m {name}"

    def _rows(self, results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        rows = []
        worst = max if self.better == "lower" else min
        for same in zip(*(r["rows"] for r in results), strict=True):
            medians = [statistics.median(r["samples"]) for r in same if r["samples"]]
            samples = [s for r in same for s in r["samples"]]
            rows.append(
                {
                    "case": same[0]["case"],
                    "contender": same[0]["contender"],
                    "metric": self.metric,
                    "unit": self.unit,
                    **summary(samples),
                    **({"median": statistics.median(medians)} if medians else {}),
                    "worst_launch": worst(medians) if medians else None,
                    "launch_medians": medians,
                    "samples": samples,
                    "missing": same[0]["missing"],
                }
            )
        return rows


def end_processes(
    pipes: Iterable[Connection], processes: Iterable[BaseProcess], timeout_s: float = 20.0
) -> None:
    """Close what contenders in processes of their own listen to, and wait for their end.

    Args:
        pipes: Our ends; the other side reads an end of file.
        processes: Started ones; who has not ended `timeout_s` later is killed. Idempotent.
        timeout_s: For each.

    """
    for pipe in pipes:
        pipe.close()
    for process in processes:
        process.join(timeout_s)
        if process.is_alive():
            process.kill()
            process.join(5)


def _measure(
    case: Case, named: Contenders, repeats: int, warmup: int, order: random.Random
) -> list[Row]:
    running = {n: c for n, c in named.items() if not isinstance(c, Missing)}
    samples: dict[str, list[float]] = {name: [] for name in running}
    for repetition in range(-warmup, repeats):
        names = list(running)
        order.shuffle(names)
        for name in names:
            started = time.perf_counter()
            value = running[name]()
            seconds = time.perf_counter() - started
            sample = seconds if value is None else float(value)
            if not math.isfinite(sample):
                raise DistributedRuntimeError(f"{name} gave {sample} in case {dict(case)}")
            if repetition >= 0:
                samples[name].append(sample)
    return [
        Row(case, name, missing=c.reason)
        if isinstance(c, Missing)
        else Row(case, name, tuple(samples[name]))
        for name, c in named.items()
    ]


def _ratios(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    ratios = []
    for same in zip(*(r["ratios"] for r in results), strict=True):
        values = [r["value"] for r in same if r["value"] is not None]
        ratios.append(
            {
                "name": same[0]["name"],
                "case": same[0]["case"],
                "value": statistics.median(values) if values else None,
                "goal": same[0]["goal"],
                "worst_launch": min(values, default=None),
                "launches": values,
            }
        )
    return ratios


def _start(command: Sequence[str], index: int, timeout_s: float) -> None:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    try:
        done = subprocess.run(
            command, env=environ, timeout=timeout_s, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise DistributedRuntimeError(f"launch {index} took more than {timeout_s:g} s") from None
    if done.returncode:
        raise DistributedRuntimeError(
            f"launch {index} failed with exit code {done.returncode}; its error is above"
        )


def _boost() -> str:
    """Ask for a larger share of a shared machine; what was granted, in words.

    `nice` has no effect across login sessions while autogroups are on, and blocking contenders
    suffer from time slices of others even so: hence all three.
    """
    granted = []

    def autogroup() -> None:
        Path("/proc/self/autogroup").write_text("-19")

    def real_time() -> None:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(5))

    attempts = {
        "nice": lambda: os.setpriority(os.PRIO_PROCESS, 0, -19),
        "autogroup": autogroup,
        "SCHED_RR": real_time,
    }
    for name, attempt in attempts.items():
        with contextlib.suppress(OSError, AttributeError):
            attempt()
            granted.append(name)
    return "+".join(granted) or "default (no priority was granted)"
