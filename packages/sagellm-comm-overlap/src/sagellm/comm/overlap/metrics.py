"""What a run hid, from the intervals of its tasks.

`eff_trace` is the share of communication time during which something computed; a run may score
high on it and still be slower than serial, when the lanes fight for the same cores. `eff_saved`
sees that, because of the overlapped run it needs only the makespan. Report both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from sagellm.core.protocols import Interval, OverlapMetrics

from .scheduler import lane_kind

__all__ = [
    "eff_attainable",
    "intersection_s",
    "length_s",
    "measure",
    "merged",
    "stretch",
]

Span = tuple[float, float]


def merged(spans: Iterable[Span]) -> list[Span]:
    """The union of spans as disjoint spans in order of time.

    >>> merged([(3, 4), (0, 1), (0.5, 2)])
    [(0, 2), (3, 4)]
    """
    out: list[Span] = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((start, end))
    return out


def length_s(spans: Iterable[Span]) -> float:
    """The total length of disjoint spans."""
    return sum(end - start for start, end in spans)


def intersection_s(first: Sequence[Span], second: Sequence[Span]) -> float:
    """How long two lists of disjoint, sorted spans are both inside one.

    >>> intersection_s([(0, 2), (3, 5)], [(1, 4)])
    2.0
    """
    i = j = 0
    total = 0.0
    while i < len(first) and j < len(second):
        start = max(first[i][0], second[j][0])
        end = min(first[i][1], second[j][1])
        if end > start:
            total += end - start
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return total


def measure(
    intervals: Sequence[Interval],
    *,
    loads_s: tuple[float, float] | None = None,
    bound_s: float | None = None,
) -> OverlapMetrics:
    """The metrics of a run.

    Args:
        intervals: What ran when. Lanes whose name begins with `compute` are compute lanes.
        loads_s: Compute and communication seconds measured apart, one lane at a time; without
            them `eff_saved` is None.
        bound_s: Lower bound of the makespan; None takes the fullest lane of this run, which is
            the weaker half of the bound.

    """
    if not intervals:
        return OverlapMetrics(0.0, 0.0, 0.0, 0.0, 0.0, None, None)
    spans: defaultdict[str, list[Span]] = defaultdict(list)
    for item in intervals:
        spans[item.lane].append((item.start_s, item.end_s))
    lanes = {lane: merged(parts) for lane, parts in spans.items()}
    kinds: dict[str, list[Span]] = {"compute": [], "comm": []}
    for lane, parts in lanes.items():
        kinds[lane_kind(lane)].extend(parts)
    compute, comm = merged(kinds["compute"]), merged(kinds["comm"])
    makespan = max(item.end_s for item in intervals) - min(item.start_s for item in intervals)
    comm_s, overlapped = length_s(comm), intersection_s(comm, compute)
    saved = None
    if loads_s is not None and loads_s[1] > 0:
        saved = (loads_s[0] + loads_s[1] - makespan) / loads_s[1]
    bound = max(map(length_s, lanes.values())) if bound_s is None else bound_s
    return OverlapMetrics(
        makespan_s=makespan,
        compute_s=length_s(compute),
        comm_s=comm_s,
        overlapped_s=overlapped,
        exposed_s=comm_s - overlapped,
        eff_trace=overlapped / comm_s if comm_s else None,
        eff_saved=saved,
        idle={
            lane: 1.0 - length_s(parts) / makespan if makespan else 0.0
            for lane, parts in lanes.items()
        },
        bound_s=bound,
        bound_ratio=bound / makespan if bound and makespan else None,
        intervals=tuple(intervals),
    )


def eff_attainable(loads_s: tuple[float, float], makespan_s: float, bound_s: float) -> float | None:
    """The saved share of what any order could save; None where nothing can be saved.

    >>> eff_attainable((4.0, 4.0), makespan_s=6.0, bound_s=5.0)
    0.6666666666666666
    """
    serial = sum(loads_s)
    return (serial - makespan_s) / (serial - bound_s) if serial > bound_s else None


def stretch(intervals: Iterable[Interval], lane: str, load_s: float) -> float:
    """How much longer a lane took than alone, |U(lane)| / load: above 1 is contention."""
    return length_s(merged((i.start_s, i.end_s) for i in intervals if i.lane == lane)) / load_s
