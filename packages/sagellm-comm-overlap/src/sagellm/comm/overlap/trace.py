"""Chrome trace files of runs, which Perfetto and chrome://tracing open.

One process per rank, one thread per lane, complete events (`X`) for tasks, flow events (`s`, `f`)
for what waits for what across lanes. Overlapping communications of one lane get a thread each
(`comm`, `comm #1`, …): complete events of one thread must nest. Times are microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sagellm.core.protocols import ConfigError, Interval, TaskId

from ._values import Foreign
from .scheduler import lane_kind

__all__ = ["TraceRun", "chrome_events", "merge_chrome_traces", "rows_of", "write_chrome_trace"]

Event = dict[str, Any]  # what the format allows: strings, numbers, one nested object


@dataclass(frozen=True, slots=True)
class TraceRun:
    """One run to draw.

    Attributes:
        intervals: What ran when, relative to `origin_s`.
        rank: Process it belongs to.
        name: For people.
        origin_s: When it began, on a clock all runs of the file share (seconds since the epoch).
        flows: Pairs (earlier, later) of tasks of which the later waited for the earlier.

    """

    intervals: tuple[Interval, ...]
    rank: int = 0
    name: str = "run"
    origin_s: float = 0.0
    flows: tuple[tuple[TaskId, TaskId], ...] = ()


def rows_of(intervals: Iterable[Interval]) -> dict[tuple[str, int], list[Interval]]:
    """Intervals by (lane, row), where intervals of one row do not overlap.

    Rows of a lane are filled first fit, so a lane without overlaps has row 0 alone.
    """
    rows: dict[tuple[str, int], list[Interval]] = {}
    for item in sorted(intervals, key=lambda interval: (interval.start_s, interval.end_s)):
        row = 0
        while (there := rows.get((item.lane, row))) and there[-1].end_s > item.start_s:
            row += 1
        rows.setdefault((item.lane, row), []).append(item)
    return rows


def chrome_events(runs: Sequence[TraceRun]) -> list[Event]:
    """The events of runs, with the earliest at 0."""
    base = min((run.origin_s for run in runs), default=0.0)
    threads = _threads(runs)
    events: list[Event] = []
    for rank in sorted({run.rank for run in runs}):
        events.append(_meta("process_name", rank, 0, name=f"rank {rank}"))
        events.append(_meta("process_sort_index", rank, 0, sort_index=rank))
    for (rank, lane, row), tid in threads.items():
        label = lane if not row else f"{lane} #{row}"
        events.append(_meta("thread_name", rank, tid, name=label))
        events.append(_meta("thread_sort_index", rank, tid, sort_index=tid))
    flow = 0
    for run in runs:
        shift = (run.origin_s - base) * 1e6
        placed: dict[TaskId, tuple[Interval, int]] = {}
        for (lane, row), items in rows_of(run.intervals).items():
            tid = threads[run.rank, lane, row]
            for item in items:
                placed[item.task] = (item, tid)
                events.append(_complete(run, item, tid, shift))
        for earlier, later in run.flows:
            if earlier in placed and later in placed:
                flow += 1
                source, target = placed[earlier], placed[later]
                at = {"s": shift + source[0].end_s * 1e6, "f": shift + target[0].start_s * 1e6}
                for phase, (_, tid) in (("s", source), ("f", target)):
                    event = _flow_end(phase, run.rank, tid, at[phase], f"{run.rank}.{flow}")
                    events.append(event)
    return events


def write_chrome_trace(path: str | Path, runs: Sequence[TraceRun]) -> Path:
    """Write runs as a trace file, and return its path."""
    return _write(path, chrome_events(runs), min((run.origin_s for run in runs), default=0.0))


def merge_chrome_traces(path: str | Path, parts: Sequence[str | Path]) -> Path:
    """Merge files written by ranks into one, on the clock of the earliest.

    Raises:
        ConfigError: A part is no trace file of this package.

    """
    loaded = [(part, _read(part)) for part in parts]
    base = min((float(trace["metadata"]["origin_s"]) for _, trace in loaded), default=0.0)
    events: list[Event] = []
    for _, trace in loaded:
        shift = (float(trace["metadata"]["origin_s"]) - base) * 1e6
        for event in trace["traceEvents"]:
            events.append({**event, "ts": event["ts"] + shift} if "ts" in event else event)
    return _write(path, events, base)


def _read(part: str | Path) -> Foreign:  # parsed JSON
    try:
        trace = json.loads(Path(part).read_text(encoding="utf-8"))
        float(trace["metadata"]["origin_s"])
        list(trace["traceEvents"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{part} is not a trace that this package wrote: {error!r}") from error
    return trace


def _write(path: str | Path, events: list[Event], origin_s: float) -> Path:
    target = Path(path)
    document = {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "metadata": {"origin_s": origin_s, "tool": "sagellm.comm.overlap"},
    }
    target.write_text(json.dumps(document), encoding="utf-8")
    return target


def _threads(runs: Sequence[TraceRun]) -> dict[tuple[int, str, int], int]:
    found = {(run.rank, *row) for run in runs for row in rows_of(run.intervals)}
    ordered = sorted(found, key=lambda key: (key[0], lane_kind(key[1]) == "comm", key[1:]))
    return {key: tid for tid, key in enumerate(ordered, start=1)}


def _complete(run: TraceRun, item: Interval, tid: int, shift: float) -> Event:
    return {
        "ph": "X",
        "name": item.name,
        "cat": lane_kind(item.lane),
        "pid": run.rank,
        "tid": tid,
        "ts": shift + item.start_s * 1e6,
        "dur": (item.end_s - item.start_s) * 1e6,
        "args": {"task": item.task, "run": run.name, "nbytes": item.nbytes},
    }


def _flow_end(phase: str, rank: int, tid: int, ts: float, flow: str) -> Event:
    event: Event = {
        "ph": phase,
        "name": "waits for",
        "cat": "dependency",
        "id": flow,
        "pid": rank,
        "tid": tid,
        "ts": ts,
    }
    return {**event, "bp": "e"} if phase == "f" else event


def _meta(kind: str, rank: int, tid: int, **args: str | int) -> Event:
    return {"ph": "M", "name": kind, "pid": rank, "tid": tid, "args": args}
