"""Which algorithm runs which call: what users write, what was measured, and what is said of it."""

from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings, strategies as st

from sagellm.comm.collective_ops import (
    GlooBackend,
    MockWorld,
    ShmBackend,
    create_comm_backend,
)
from sagellm.comm.collective_ops._shm.choice import switch_bytes
from sagellm.comm.collective_ops._shm.settings import ShmSettings, facts_of
from sagellm.comm.collective_ops.choice import (
    NATIVE,
    AlgorithmTable,
    Rule,
    algorithms_known,
    choose,
    expected_us,
    measured_table,
    parse_algorithms,
)
from sagellm.core.protocols import (
    CollectiveMismatchError,
    ConfigError,
    CostModelProtocol,
    CostTable,
    Estimate,
)

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


def test_the_fastest_is_chosen_where_there_is_no_default_and_all_were_measured():
    table = CostTable(
        "f", 1, curves(one_shot={4096: 2.0, 65536: 9.0}, two_shot={4096: 3.0, 65536: 8.9})
    )  # fmt: skip
    names = {"all_reduce": ("one_shot", "two_shot")}
    rules = measured_table(table, 4, "here", names, None).rules
    assert [str(r) for r in rules] == ["all_reduce:0-16k:one_shot", "all_reduce:16k-:two_shot"]
    names = {"all_reduce": ("one_shot", "two_shot", "other")}
    assert measured_table(table, 4, "here", names, None).rules == ()


def test_a_measurement_cut_short_says_nothing_of_sizes_it_did_not_compare():
    names = {"all_reduce": ("one_shot", "two_shot")}
    table = CostTable(
        "f", 1, curves(one_shot={4096: 2.0, 16384: 5.0}, two_shot={4096: 3.0})
    )  # fmt: skip
    found = measured_table(table, 4, "here", names, None)
    assert [str(r) for r in found.rules] == ["all_reduce:0-8k:one_shot"]
    assert switch_bytes((found,), 32768) == 32768
    table = CostTable("f", 1, curves(native={4096: 3.0}, direct={4096: 2.0}))
    (rule,) = measured_table(table, 4, "here", planned=(4096, 65536)).rules
    assert str(rule) == "all_reduce:0-16k:direct"


def test_expected_times_lie_on_lines_between_the_points():
    table = CostTable("f", 1, curves(ring={1000: 10.0, 2000: 20.0, 4000: 60.0}, tree={8: 3.0}))
    at = [expected_us(table, "all_reduce", "ring", 4, n) for n in (0, 1500, 3000, 5000)]
    assert at == [0.0, 15.0, 40.0, 80.0]
    assert expected_us(table, "all_reduce", "tree", 4, 999) == 3.0
    assert expected_us(table, "all_reduce", "direct", 4, 1) is None


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


NAMES_OF_ANY = [
    "all_gather:0-4k:flat,broadcast:flat", "all_reduce:-1k:two_d,all_reduce:1k-:two_shot",
    "reduce:leaders,all_reduce:symmetric", "barrier:direct,all_to_all:pairwise",
]  # fmt: skip


@pytest.mark.parametrize("spec", ["gloo", "shm", "hier", "mock"])
def test_setting_may_name_what_any_backend_has(spec, monkeypatch):
    for text in NAMES_OF_ANY:
        monkeypatch.setenv("SAGELLM_COMM_COLLECTIVE_OPS_ALGORITHMS", text)
        create_comm_backend(spec).close()
    with pytest.raises(ConfigError, match="'flat' in 'all_gather:flat' is not one of"):
        parse_algorithms("all_gather:flat")


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


def in_order(b, make, texts):
    """A long call whose caller goes on, then a short one on the same elements."""
    found = []
    for text in texts:
        mine = make(b, text)
        for _ in range(5):
            x = torch.full((1 << 20,), b.rank + 1.0)
            work = mine.all_reduce(x, async_op=True)
            mine.all_reduce(x[:16], "max")
            work.wait()
            found.append((x[0].item(), x[-1].item()))
    return set(found)


def with_algorithms(b, text):
    return GlooBackend(process_group=b.process_group, timeout_s=20, options={"algorithms": text})


def test_scheduled_calls_and_the_librarys_keep_their_order(gloo_pools):
    texts = ["all_reduce:4k-:ring", "all_reduce:0-4k:ring"]
    found = gloo_pools(2).run(in_order, with_algorithms, texts)
    assert found == [{(3.0, 3.0)}] * 2


def algorithms_that_differ(b):
    text = "all_reduce:ring" if b.rank == 0 else "all_reduce:tree"
    with pytest.raises(CollectiveMismatchError, match="options differ") as caught:
        GlooBackend(process_group=b.process_group, timeout_s=20, options={"algorithms": text})
    return caught.value.calls


def choices(b):
    mine = GlooBackend(process_group=b.process_group, timeout_s=20, options={"algorithms": ALL})
    return [mine.explain(op, n) for op in ("all_reduce", "all_gather") for n in (1, 1 << 20)]


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


# -- shm ----------------------------------------------------------------------------------


def model(lines, op="all_reduce", size=2):
    """A cost model that has observed algorithms: fixed and per-byte microseconds of each."""

    def select(table, op, nbytes, group):
        times = {
            a: p[0][1] + (p[1][1] - p[0][1]) * nbytes / p[1][0]
            for (o, a, n), p in table.curves.items()
            if (o, n) == (op, group)
        }
        if not times:
            raise ConfigError("the cost table has nothing of it")
        best = min(times, key=times.get)
        return best, Estimate(times[best], 0.0, 0.0, None, "measured")

    found = Mock(spec=CostModelProtocol)
    found.freeze.return_value = CostTable(
        "seen", 1, {(op, a, size): ((0, t), (1 << 20, t + (1 << 20) * u)) for a, (t, u) in lines}
    )
    found.select.side_effect = select
    return found


def shm_over(b, engine, **more):
    options = {"engine": engine, "statistics": True, **more.pop("options", {})}
    return ShmBackend(None, b.process_group, timeout_s=20, options=options, **more)


def shm_by_model(b, engine):
    """Rank 0's model says 10000 bytes, the others' nothing of the kind."""
    lines = [("one_shot", (2.0, 0.002)), ("two_shot", (12.0, 0.001))]
    with shm_over(b, engine, cost_model=model(lines if b.rank == 0 else lines[:1])) as shm:
        for n in (1000, 4000, 1 << 14):
            assert shm.all_reduce(torch.ones(n))[0].item() == b.size
        ran = {d.algorithm for d in shm.get_stats().details if d.op == "all_reduce"}
        said = [shm.explain("all_reduce", n) for n in (4000, 1 << 16)]
        return (
            sorted(ran),
            [c.algorithm for c in said],
            said[0].reason,
            said[0].rejected["two_shot"],
        )


@pytest.mark.parametrize("engine", ["native", "python"])
def test_rank_0s_cost_model_says_where_two_shot_begins(gloo_pools, engine):
    first, *others = gloo_pools(2).run(shm_by_model, engine)
    assert others == [first]
    ran, said, reason, rejected = first
    assert ran == said == ["one_shot", "two_shot"]
    assert "taken up to 8191 bytes, by cost model seen" in reason
    assert "expected to take 10.0 us" in reason
    assert "expected to take 16.0 us" in rejected


def test_order_of_rules_is_no_difference_to_shm():
    rules = ["all_reduce:0-4k:one_shot", "all_gather:direct"]
    asked = [ShmSettings.of("shm", {"algorithms": ",".join(r)}) for r in (rules, rules[::-1])]
    assert facts_of(asked[0]) == facts_of(asked[1])


def test_more_rules_than_the_compiled_engine_keeps_are_refused():
    rules = [f"all_reduce:{i}-{i + 1}:two_shot" for i in range(33)]
    assert len(ShmSettings.of("shm", {"algorithms": ",".join(rules[1:])}).overrides()) == 32
    with pytest.raises(ConfigError, match="option algorithms has 33 rules; shm takes 32"):
        ShmBackend(options={"algorithms": ",".join(rules)})


# -- rings sorted by host -----------------------------------------------------------------


@pytest.mark.parametrize("op", ["all_reduce", "all_gather_into_tensor"])
@pytest.mark.parametrize("hosts", [None, [[0, 2, 4], [1, 3, 5]]])
def test_a_ring_sorted_by_host_crosses_each_boundary_once_a_step(op, hosts):
    world = MockWorld(6, algorithms=f"{op}:ring", hosts=hosts)
    if op == "all_reduce":
        world.run(lambda b: b.all_reduce(torch.full((60,), b.rank + 1.0)))
        steps, part = 10, 40
    else:
        world.run(lambda b: b.all_gather_into_tensor(torch.empty(60), torch.ones(10)))
        steps, part = 5, 40
    sent = [t for t in world.ledger if t.peer is not None]
    crossing = [t.nbytes for t in sent if t.rank % 2 != t.peer % 2]
    assert len(sent) == 6 * steps
    a_step = 6 if hosts is None else 2
    assert sum(crossing) == a_step * steps * part


def test_a_part_of_a_group_keeps_the_order_of_its_hosts():
    world = MockWorld(5, algorithms="all_reduce:ring", hosts=[[0, 2, 4], [1, 3]])
    world.run(lambda b: (p := b.split([4, 3, 2, 1])) and p.all_reduce(torch.ones(8)))
    sent = [t for t in world.ledger if t.peer is not None]
    assert sum(t.rank % 2 != t.peer % 2 for t in sent) == 2 * 6 < len(sent)


def crossings(b):
    """Messages of this rank to another host, interleaved ranks, with hosts known and not."""
    found = []
    for more in ({"hosts": [[0, 2], [1, 3]]}, {}):
        options = {"algorithms": "all_reduce:ring", **more}
        mine = GlooBackend(process_group=b.process_group, timeout_s=20, options=options)
        peers = watched(mine._inner)
        assert mine.all_reduce(torch.full((9,), b.rank + 1.0)).tolist() == [10.0] * 9
        found.append(sum((p - b.rank) % 2 for p in peers))
    return found


def watched(transport):
    """Fills with whom a transport sends messages to."""
    peers, issue = [], transport.issue_batch

    def issue_batch(calls):
        peers.extend(call.peer for call in calls if call.op == "send")
        return issue(calls)

    transport.issue_batch = issue_batch
    return peers


def test_gloo_passes_rings_host_by_host_where_hosts_are_known(gloo_pools):
    sorted_, unsorted = map(sum, zip(*gloo_pools(4).run(crossings), strict=True))
    assert (sorted_, unsorted) == (2 * 6, 4 * 6)
