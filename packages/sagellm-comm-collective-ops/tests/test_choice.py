"""Which algorithm runs which call: what users write, what was measured, and what is said of it."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from sagellm.comm.collective_ops import GlooBackend, MockWorld
from sagellm.comm.collective_ops.calibrate import cached_table, keep_table
from sagellm.comm.collective_ops.choice import (
    NATIVE,
    AlgorithmTable,
    Rule,
    algorithms_known,
    choose,
    measured_table,
    parse_algorithms,
)
from sagellm.core.protocols import CollectiveMismatchError, ConfigError, CostTable

KNOWN = algorithms_known()


# -- what users write ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("all_redude:0-1k:ring", "'all_redude' in 'all_redude:0-1k:ring' is not one of all_gather"),
        ("all_reduce:0-1k:star", "'star' in 'all_reduce:0-1k:star' is not one of native, ring"),
        ("all_reduce:0-1x:ring", "size '1x'"),
        ("all_reduce:4k:ring", "'4k' in 'all_reduce:4k:ring' has no '-'"),
        ("all_reduce:4k-4k:ring", "is empty"),
        ("all_reduce", "is not op:low-high:algorithm"),
        ("all_reduce:1:2:ring", "is not op:low-high:algorithm"),
        ("all_reduce:ring,,", "empty entry"),
        ("all_reduce:-2k:ring,all_reduce:1k-:tree", "'all_reduce:0-2k:ring' and .* overlap"),
        ("all_reduce:0-²:ring", "size '²'"),
    ],
)
def test_what_cannot_be_read_is_named(text, words):
    with pytest.raises(ConfigError, match=words):
        parse_algorithms(text)


def test_entries_are_read_with_suffixes_open_ends_and_other_names():
    table = parse_algorithms(" All_Reduce : 1K-2m : one_shot , all_gather_into_tensor:ring ")
    assert table.rules == (
        Rule("all_reduce", 1 << 10, 2 << 20, "direct"),
        Rule("all_gather", 0, None, "ring"),
    )
    assert table.pick("all_reduce", 1023) is None
    assert table.pick("all_reduce", 1024).algorithm == "direct"
    assert table.pick("all_reduce", 2 << 20) is None
    own = algorithms_known({"all_reduce": ["one_shot"]})
    assert parse_algorithms("all_reduce:one_shot", own).rules[0].algorithm == "one_shot"
    assert parse_algorithms("").rules == ()


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_what_is_written_is_read_back(data):
    rules = []
    for op in data.draw(st.lists(st.sampled_from(sorted(KNOWN)), unique=True)):
        edges = sorted(data.draw(st.sets(st.integers(0, 1 << 34), min_size=1, max_size=4)))
        for low, high in zip(edges, [*edges[1:], None], strict=True):
            rules.append(Rule(op, low, high, data.draw(st.sampled_from(KNOWN[op]))))
    table = AlgorithmTable(tuple(rules), "x")
    assert parse_algorithms(",".join(map(str, rules)), source="x") == table


@given(st.text(alphabet="alreduc_gthk:-,0123456789 m\tring٣", max_size=60))
@settings(max_examples=300, deadline=None)
def test_rubbish_is_read_or_refused_and_nothing_else(text):
    try:
        table = parse_algorithms(text)
    except ConfigError:
        return
    assert all(r.op in KNOWN and r.algorithm in KNOWN[r.op] for r in table.rules)


# -- what was measured --------------------------------------------------------------------


def curves(**by_algorithm):
    return {("all_reduce", a, 4): tuple(points.items()) for a, points in by_algorithm.items()}


def test_schedules_run_where_they_were_measured_to_win_by_a_tenth():
    table = CostTable(
        "f", 1, curves(
            native={1 << 10: 100.0, 1 << 14: 100.0, 1 << 20: 900.0},
            direct={1 << 10: 40.0, 1 << 14: 60.0, 1 << 20: 5000.0},
            ring={1 << 10: 300.0, 1 << 14: 300.0, 1 << 20: 850.0},
        ),
    )  # fmt: skip
    measured = measured_table(table, 4, "here")
    assert [str(rule) for rule in measured.rules] == ["all_reduce:0-128k:direct"]
    assert measured_table(table, 2, "here").rules == ()


def test_nothing_is_chosen_where_the_library_was_not_measured():
    table = CostTable("f", 1, curves(ring={1: 1.0}, tree={1: 9.0}))
    assert measured_table(table, 4, "here").rules == ()


def test_what_was_asked_for_goes_before_what_was_measured():
    asked = parse_algorithms("all_reduce:0-1k:native")
    measured = AlgorithmTable((Rule("all_reduce", 0, None, "ring"),), "here")
    assert choose((asked, measured), "all_reduce", 1)[0].algorithm == NATIVE
    assert choose((asked, measured), "all_reduce", 1024)[0].algorithm == "ring"
    assert choose((asked, measured), "all_reduce", None)[0].algorithm == "ring"
    assert choose((asked, measured), "all_gather", 1) is None


# -- what is said of it -------------------------------------------------------------------


def test_explain_names_what_runs_why_and_what_was_rejected():
    b = MockWorld(3, algorithms="all_reduce:0-64k:one_shot,all_gather:native").backend(0)
    small, large = b.explain("all_reduce", 100), b.explain("all_reduce", 1 << 16)
    assert (small.algorithm, large.algorithm) == ("direct", "native")
    assert small.reason == "option algorithms has all_reduce:0-64k:direct"
    assert {"native", "ring", "tree"} <= set(small.rejected)
    assert "direct" not in small.rejected
    assert "not asked for" in large.rejected["ring"]
    gather = b.explain("all_gather_into_tensor", 5)
    assert gather.algorithm == "native"
    assert "leaves all_gather:0-:native to the library" in gather.reason
    assert b.explain("barrier", 0).rejected == {}


def test_setting_is_used_where_no_option_is_given_and_its_origin_is_named(monkeypatch):
    monkeypatch.setenv("SAGELLM_COMM_COLLECTIVE_OPS_ALGORITHMS", "all_reduce:ring")
    b = MockWorld(2).backend(0)
    choice = b.explain("all_reduce", 5)
    assert choice.algorithm == "ring"
    assert "environment SAGELLM_COMM_COLLECTIVE_OPS_ALGORITHMS" in choice.reason
    assert MockWorld(2, algorithms="").backend(0).explain("all_reduce", 5).algorithm == "native"
    monkeypatch.setenv("SAGELLM_COMM_COLLECTIVE_OPS_ALGORITHMS", "nonsense")
    with pytest.raises(ConfigError, match="environment SAGELLM_COMM_COLLECTIVE_OPS_ALGORITHMS"):
        MockWorld(2).backend(0)


def test_option_that_is_no_string_is_refused():
    with pytest.raises(ConfigError, match="option algorithms is 3, not a string"):
        GlooBackend(options={"algorithms": 3})


# -- gloo ---------------------------------------------------------------------------------

ALL = "all_reduce:halving_doubling,all_gather:ring,reduce_scatter:ring,broadcast:tree,reduce:ring"


def calls_by_schedule(b):
    mine = GlooBackend(process_group=b.process_group, timeout_s=20, options={"algorithms": ALL})
    explained = mine.explain("all_reduce", 64)
    x = mine.all_reduce(torch.full((10,), b.rank + 1.0))
    flag = mine.all_reduce(torch.tensor([b.rank == 0]))
    works = [mine.all_reduce(torch.full((7,), float(i)), async_op=True) for i in range(3)]
    parts = mine.all_gather(torch.tensor([b.rank]))
    part = mine.reduce_scatter([torch.ones(2)] * b.size, "avg")
    top = mine.broadcast(torch.tensor([float(b.rank)]), b.size - 1)
    root = mine.reduce(torch.ones(3), 0)
    half = mine.split(range(b.size)).all_reduce(torch.ones(3, dtype=torch.bfloat16), "avg")
    queued = [work.wait()[0].item() for work in works]
    counted = mine.get_stats().ops
    return (
        explained.algorithm, x[0].item(), flag.item(), queued, [p.item() for p in parts],
        part.tolist(), top.item(), root[0].item() if b.rank == 0 else 3.0 * 0 + b.size,
        half.tolist(), counted["all_reduce"].calls, "send" in counted,
    )  # fmt: skip


def algorithms_that_differ(b):
    text = "all_reduce:ring" if b.rank == 0 else "all_reduce:tree"
    with pytest.raises(CollectiveMismatchError, match="options differ") as caught:
        GlooBackend(process_group=b.process_group, timeout_s=20, options={"algorithms": text})
    return caught.value.calls


def choices(b):
    mine = GlooBackend(process_group=b.process_group, timeout_s=20, options={"algorithms": ALL})
    return [mine.explain(op, n) for op in ("all_reduce", "all_gather") for n in (1, 1 << 20)]


def measured_at_start(b, folder):
    import os

    os.environ["XDG_CACHE_HOME"] = folder
    made = [
        GlooBackend(process_group=b.process_group, timeout_s=20, options={"calibrate": True})
        for _ in range(2)
    ]
    assert made[0].all_reduce(torch.ones(3))[0].item() == b.size
    del os.environ["XDG_CACHE_HOME"]
    first, second = ([str(r) for r in g._chooser.tables[1].rules] for g in made)
    assert first == second
    return first, made[0].get_stats().ops["all_reduce"].calls, made[1]._chooser.tables[1].source


@pytest.mark.parametrize("size", [2, 3])
def test_gloo_runs_what_is_asked_for(gloo_pools, size):
    total = size * (size + 1) / 2
    wanted = (
        "halving_doubling", total, True, [0.0, float(size), 2.0 * size], list(range(size)),
        [1.0, 1.0], size - 1.0, size, [1.0] * 3, 5, False,
    )  # fmt: skip
    assert gloo_pools(size).run(calls_by_schedule) == [wanted] * size


def test_ranks_that_differ_are_told_before_anything_is_sent(gloo_pools):
    for calls in gloo_pools(2).run(algorithms_that_differ):
        assert calls == {0: "all_reduce:0-:ring", 1: "all_reduce:0-:tree"}


def test_every_rank_gives_the_same_explanation(gloo_pools):
    first, *others = gloo_pools(3).run(choices)
    assert others == [first] * 2


def test_what_was_measured_is_everybodys_and_is_kept(gloo_pools, tmp_path):
    first, *others = gloo_pools(2).run(measured_at_start, str(tmp_path))
    assert others == [first]
    (kept,) = (tmp_path / "sagellm-comm").iterdir()
    key = kept.stem.removeprefix("collective_ops-")
    assert first[1:] == (1, f"calibration {key}")


def test_file_that_is_no_calibration_is_said_and_not_used(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    table = CostTable("k", 1, curves(native={1024: 2.0}))
    keep_table(table)
    assert cached_table("k") == table
    (kept,) = (tmp_path / "sagellm-comm").iterdir()
    kept.write_text("{}")
    assert cached_table("k") is None
    assert "is no calibration" in caplog.text
    assert cached_table("other") is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))
    keep_table(table)
