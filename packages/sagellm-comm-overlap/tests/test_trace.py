"""Trace files and timelines are well-formed and say what ran."""

import itertools
import json
import xml.etree.ElementTree as ET

import pytest

from sagellm.comm.overlap import (
    TraceRun,
    merge_chrome_traces,
    render_timeline,
    write_chrome_trace,
)
from sagellm.core.protocols import CompletedWork, ConfigError, Interval

RUN = (
    Interval(0, "mlp", "compute", 0.0, 0.004),
    Interval(1, "reduce", "comm", 0.004, 0.009, 4096),
    Interval(2, "gather", "comm", 0.005, 0.010),
    Interval(3, "mlp2", "compute", 0.004, 0.008),
)


def check_chrome(document):
    """The rules of the format: known phases, numbers where due, nesting, paired flows."""
    flows = {}
    spans = {}
    for event in document["traceEvents"]:
        assert event["ph"] in {"X", "M", "s", "f"}
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        if event["ph"] == "X":
            assert event["ts"] >= 0
            assert event["dur"] >= 0
            spans.setdefault((event["pid"], event["tid"]), []).append(
                (event["ts"], event["ts"] + event["dur"])
            )
        if event["ph"] in "sf":
            flows.setdefault(event["id"], []).append(event["ph"])
        if event["ph"] == "f":
            assert event["bp"] == "e"
    for thread in spans.values():
        thread.sort()
        assert all(b[0] >= a[1] - 1e-6 for a, b in itertools.pairwise(thread))
    assert all(phases == ["s", "f"] for phases in flows.values())
    return spans, flows


def names(document, kind):
    return {
        (e["pid"], e["tid"]): e["args"]["name"]
        for e in document["traceEvents"]
        if e["ph"] == "M" and e["name"] == kind
    }


def test_a_trace_has_a_process_per_rank_and_a_thread_per_lane(tmp_path):
    runs = [TraceRun(RUN, rank=r, origin_s=100.0 + r, flows=((0, 1), (0, 2))) for r in (0, 1)]

    document = json.loads(write_chrome_trace(tmp_path / "t.json", runs).read_text())

    spans, flows = check_chrome(document)
    assert len(flows) == 4
    assert set(names(document, "process_name").values()) == {"rank 0", "rank 1"}
    threads = names(document, "thread_name")
    assert [threads[0, tid] for tid in (1, 2, 3)] == ["compute", "comm", "comm #1"]
    assert spans[0, 1] == [(0.0, 4000.0), (4000.0, 8000.0)]
    assert min(start for start, _ in spans[1, 4]) == pytest.approx(1e6)


def test_traces_of_ranks_merge_on_one_clock(tmp_path):
    late = write_chrome_trace(tmp_path / "1.json", [TraceRun(RUN, rank=1, origin_s=50.5)])
    early = write_chrome_trace(tmp_path / "0.json", [TraceRun(RUN, rank=0, origin_s=50.0)])

    document = json.loads(merge_chrome_traces(tmp_path / "all.json", [late, early]).read_text())

    spans, _ = check_chrome(document)
    starts = {
        pid: min(s for (p, _), rows in spans.items() if p == pid for s, _ in rows) for pid in (0, 1)
    }
    assert starts == {0: 0.0, 1: pytest.approx(5e5)}


@pytest.mark.parametrize("text", ["not json", "[]", "{}"])
def test_a_file_that_is_no_trace_is_refused(tmp_path, text):
    part = tmp_path / "odd.json"
    part.write_text(text)

    with pytest.raises(ConfigError, match=r"odd\.json"):
        merge_chrome_traces(tmp_path / "all.json", [part])


def test_a_manager_traces_runs_and_batches(make_manager, tmp_path):
    manager = make_manager(trace=tmp_path / "run.json")
    manager.schedule([lambda: 1] * 2, [lambda x: CompletedWork(x)] * 2).wait()
    manager.overlap_batches([[CompletedWork(1)], [CompletedWork(2)]])

    manager.close()

    document = json.loads((tmp_path / "run.json").read_text())
    spans, flows = check_chrome(document)
    assert len(flows) == 2
    assert sum(map(len, spans.values())) == 4 + 6
    assert len(manager.trace_runs()) == 2


def test_a_manager_that_does_not_trace_says_so(manager, tmp_path):
    with pytest.raises(ConfigError, match="trace=True"):
        manager.write_trace(tmp_path / "t.json")


def test_a_timeline_draws_every_task_once_with_its_lane():
    text = render_timeline(RUN, "prefill <1> & 2")

    root = ET.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    hover = [e.text for e in root.iter(f"{space}title")]
    labels = [e.text for e in root.iter(f"{space}text")]
    assert hover[0] == "prefill <1> & 2"
    assert "reduce on comm: 4.000 ms + 5.000 ms, 4096 bytes" in hover
    assert len(hover) == 1 + len(RUN)
    assert {"compute", "comm", "time in ms", "mlp", "reduce", "gather"} <= set(labels)
    bars = [e for g in root.iter(f"{space}g") for e in g.iter(f"{space}rect")]
    assert {bar.get("fill") for bar in bars} == {"#3b7dd8", "#e0832d"}
    boxes = [(float(b.get("x")), float(b.get("width")), float(b.get("y"))) for b in bars]
    rows = {}
    for x, width, y in sorted(boxes):
        assert x >= rows.get(y, 0.0) - 0.2  # bars of one row do not cover each other
        rows[y] = x + width
    assert max(rows.values()) <= 1100


@pytest.mark.parametrize("count", [0, 1, 200])
def test_a_timeline_of_any_size_is_well_formed(count):
    run = [
        Interval(
            i,
            f"task with a long name {i}",
            f"rank{i % 3}/c{'ompute' if i % 2 else 'omm'}",
            i / 7,
            i / 7 + 1,
        )
        for i in range(count)
    ]

    root = ET.fromstring(render_timeline(run))

    assert len(list(root.iter("{http://www.w3.org/2000/svg}g"))) == count
