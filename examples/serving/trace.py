"""One Chrome trace of all ranks, for Perfetto: a process per rank, a thread per lane.

Ranks are processes of one host, so their monotonic clocks are one clock.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from serving.messages import Job, Span

LANES = ("compute", "kv send", "kv receive")


def from_first_byte(spans: Mapping[int, Sequence[Span]]) -> dict[int, list[Span]]:
    """Cuts off the time in which a receiver only waited for a layer to be sent."""
    sent: dict[tuple[str, str], float] = {}
    for of_rank in spans.values():
        for span in of_rank:
            if span.lane == "kv send":
                key = (span.request, span.name)
                sent[key] = min(span.start_s, sent.get(key, span.start_s))

    def cut(span: Span) -> Span:
        if span.lane != "kv receive":
            return span
        first_s = sent.get((span.request, span.name), span.start_s)
        return msgspec.structs.replace(span, start_s=min(span.end_s, max(span.start_s, first_s)))

    return {rank: [cut(s) for s in of_rank] for rank, of_rank in spans.items()}


def write_trace(path: Path, job: Job, spans: Mapping[int, Sequence[Span]]) -> None:
    """Write everything the ranks did, with an arrow from each layer sent to its arrival."""
    begin_s = min((s.start_s for of in spans.values() for s in of), default=0.0)

    def us(at_s: float) -> float:
        return round((at_s - begin_s) * 1e6, 3)

    # Any: the values of trace events are strings, numbers and maps
    events: list[dict[str, Any]] = []
    for rank in range(job.world_size):
        label = f"rank {rank}: {job.role(rank)}"
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": label}})
        order = {"sort_index": rank}
        events.append({"ph": "M", "name": "process_sort_index", "pid": rank, "args": order})
        for tid in sorted({LANES.index(s.lane) for s in spans.get(rank, ())}):
            name = {"name": LANES[tid]}
            events.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": tid, "args": name})
    for rank, of_rank in spans.items():
        for span in of_rank:
            args: dict[str, Any] = {"request": span.request}
            if span.nbytes:
                args["bytes"] = span.nbytes
            events.append(
                {
                    "ph": "X",
                    "name": span.name,
                    "cat": span.lane,
                    "pid": rank,
                    "tid": LANES.index(span.lane),
                    "ts": us(span.start_s),
                    "dur": round((span.end_s - span.start_s) * 1e6, 3),
                    "args": args,
                }
            )
    events += _arrows(spans, us)
    trace = {"traceEvents": events, "displayTimeUnit": "ms"}
    path.write_text(json.dumps(trace, separators=(",", ":")) + "\n")


# Any: as above; us: a function of seconds
def _arrows(spans: Mapping[int, Sequence[Span]], us: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    """From every layer that a rank sent to its arrival at every rank that got it."""
    arrivals: dict[tuple[str, str], list[tuple[int, Span]]] = {}
    for rank, of_rank in spans.items():
        for span in of_rank:
            if span.lane == "kv receive":
                arrivals.setdefault((span.request, span.name), []).append((rank, span))
    events: list[dict[str, Any]] = []
    for rank, of_rank in spans.items():
        for span in of_rank:
            if span.lane != "kv send":
                continue
            for to, arrival in arrivals.get((span.request, span.name), ()):
                ends = {"name": "kv", "cat": "kv", "id": len(events) // 2}
                out, into = LANES.index("kv send"), LANES.index("kv receive")
                start = us(span.start_s)
                stop = max(start, us(arrival.end_s))
                events.append({**ends, "ph": "s", "pid": rank, "tid": out, "ts": start})
                events.append({**ends, "ph": "f", "bp": "e", "pid": to, "tid": into, "ts": stop})
    return events
