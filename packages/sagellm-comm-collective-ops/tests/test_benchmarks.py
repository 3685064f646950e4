"""The benchmarks of collectives: every promised ratio, and real ranks on a small case."""

import contextlib
import importlib.metadata
import os

import pytest
import torch

from sagellm.comm.collective_ops.benchmarks import (
    _adapter,
    _contenders,
    _deepspeed,
    _fleet,
    _pairs,
    _rank,
    _ranks,
    _runs,
    bench_all_reduce,
    bench_collectives,
    bench_fusion,
    bench_hierarchical,
    bench_wrapper,
)
from sagellm.core.protocols import DistributedRuntimeError
from sagellm.core.protocols.bench import Benchmark, Missing, Row

KIB, MIB = 1 << 10, 1 << 20

# the issue's tables: measure, op, dtype, bytes, ratio of an engine, goal in pure Python and with C
PROMISED = [
    ("time", "all_reduce", "float32", KIB, "gloo/{} registered", 40, 120),
    ("time", "all_reduce", "float32", 64 * KIB, "gloo/{} plain", 14, 38),
    ("time", "all_reduce", "float32", MIB, "gloo/{} plain", 3.5, 7),
    ("time", "all_reduce", "float32", 16 * MIB, "gloo/{} plain", 2.5, 5.4),
    ("time", "all_reduce", "float32", 64 * MIB, "gloo/{} plain", 2.5, 5.4),
    ("time", "all_reduce", "float32", KIB, "mpi/{} registered", None, 0.9),
    ("time", "all_reduce", "float32", 64 * KIB, "mpi/{} plain", 1.6, 3),
    ("time", "all_reduce", "float32", MIB, "mpi/{} plain", 1.3, 2.2),
    ("time", "all_reduce", "float32", 16 * MIB, "mpi/{} plain", 1.4, 3),
    ("time", "all_reduce", "float32", 64 * MIB, "mpi/{} plain", 1.4, 3),
    ("time", "all_reduce", "float32", KIB, "deepspeed/{} registered", None, 1.5),
    ("time", "all_reduce", "float32", 64 * KIB, "deepspeed/{} plain", None, 2),
    ("time", "all_reduce", "float32", MIB, "deepspeed/{} plain", None, 1.4),
    ("time", "all_reduce", "float32", 16 * MIB, "deepspeed/{} plain", None, 2),
    ("time", "all_reduce", "float32", 64 * MIB, "deepspeed/{} plain", None, 2),
    ("time", "all_reduce", "bfloat16", KIB, "gloo/{} registered", 25, 80),
    ("time", "all_reduce", "bfloat16", MIB, "gloo/{} plain", 2, 4.5),
    ("time", "all_reduce", "bfloat16", 64 * MIB, "gloo/{} plain", 2, 5),
    ("time", "all_reduce", "bfloat16", KIB, "deepspeed/{} registered", None, 1.5),
    ("time", "all_reduce", "bfloat16", MIB, "deepspeed/{} plain", None, 1.2),
    ("time", "all_reduce", "bfloat16", 64 * MIB, "deepspeed/{} plain", None, 2),
    ("time", "all_reduce", "float32", 16 * MIB, "gloo/{} symmetric", 6, 6),
    ("time", "all_reduce", "float32", 64 * MIB, "gloo/{} symmetric", 6, 6),
    ("time", "all_reduce", "float32", 64 * MIB, "copy/{} plain", 0.5, 0.8),
    ("time", "all_gather", "float32", KIB, "gloo/{} registered", 18, 60),
    ("time", "all_gather", "float32", MIB, "gloo/{} plain", 3, 5),
    ("time", "reduce_scatter", "float32", KIB, "gloo/{} registered", 18, 60),
    ("time", "reduce_scatter", "float32", MIB, "gloo/{} plain", 3, 5),
    ("oversubscribed", "all_reduce", "float32", KIB, "deepspeed/{} registered", 10, 10),
    ("oversubscribed", "all_reduce", "float32", KIB, "mpich/{} registered", 10, 10),
    ("p99", "all_reduce", "float32", MIB, "idle/busy {} plain", None, 1 / 3),
    ("statistics", "all_reduce", "float32", KIB, "budget/statistics of {}", 1, 1),
    ("lost", "all_reduce", "float32", KIB, "budget/naming by {}", 1, 1),
]
LISTS = [
    ("gloo_per_tensor/gloo_fused", 4.5),
    ("shm-native_per_tensor/shm-native_fused", 1.0),
    ("shm-python_per_tensor/shm-python_fused", 1.0),
]
WRAPPER = [("budget/passed", 1.0), ("budget/recorded", 1.0), ("budget/hooked", 1.0)]
HOSTS = [
    ("interleaved", "flat_gloo/hier", 2.7),
    ("contiguous", "flat_gloo/hier", 1.3),
    ("interleaved", "flat_gloo/hier_bf16", 5.0),
    ("contiguous", "flat_gloo/hier_bf16", 2.5),
]
PROGRAM = [("gloo/c10d-python", 15), ("gloo/c10d-native", 20)]
JUDGED_UNDER_NORMAL = ("oversubscribed", "p99")


@pytest.fixture(scope="module")
def ranks():
    """Processes stay for the whole module, as they do for a launch."""
    yield
    _fleet.close_all()


@pytest.fixture
def only_gloo_and_shm(monkeypatch, ranks):
    def missing(kind):
        return "" if kind in ("gloo", "shm") else "left out of this test"

    monkeypatch.setattr(_runs, "missing", missing)
    monkeypatch.setattr(_runs, "SAMPLE_S", 0.001)


def case_of(measure="time", nbytes=KIB, **how):
    return {
        "op": "all_reduce",
        "measure": measure,
        "dtype": "float32",
        "nbytes": nbytes,
        "ranks": 2,
        "scheduling": "normal",
        **how,
    }


def ratios_without_processes(bench, monkeypatch):
    """All ratios of a full run in which each call of each contender takes a second."""

    class FakeRanks:
        def ask(self, do, **arguments):
            return [{}, {}] if do == "lose" else ["", ""]

    @contextlib.contextmanager
    def prepared(case, variants):
        yield dict.fromkeys(variants, 1.0)

    for module in (bench, _runs):
        monkeypatch.setattr(module, "prepared", prepared, raising=False)
    monkeypatch.setattr(_fleet, "ranks_of", lambda kind, world: FakeRanks())
    monkeypatch.setattr(bench_collectives._adapter, "contenders", _adapter_contenders)
    rows = []
    for case in bench.cases(False):
        with bench.contenders(case) as named:
            rows += [
                Row(case, name, missing=run.reason) if isinstance(run, Missing)
                else Row(case, name, (1.0,))
                for name, run in named.items()
            ]  # fmt: skip
    return list(bench.ratios(rows))


@contextlib.contextmanager
def _adapter_contenders(case):
    yield dict.fromkeys(("ours", "torch", "mock"), lambda: 1.0)


def judged_under(measure):
    return "normal" if measure in JUDGED_UNDER_NORMAL else "rr"


def test_every_figure_of_the_issue_is_a_ratio_with_its_goal(monkeypatch):
    found = {}
    for bench in (bench_all_reduce, bench_collectives):
        for r in ratios_without_processes(bench, monkeypatch):
            key = (
                r.case.get("measure"), r.case["op"], r.case.get("dtype"), r.case["nbytes"], r.name,
                r.case.get("scheduling"),
            )  # fmt: skip
            assert key not in found
            found[key] = r

    wanted = {
        (measure, op, dtype, nbytes, name.format(f"shm-{engine}"), judged_under(measure)): goal
        for measure, op, dtype, nbytes, name, *goals in PROMISED
        for engine, goal in zip(("python", "native"), goals, strict=True)
    }
    wanted |= {("program", "all_reduce", "float32", KIB, name, "rr"): g for name, g in PROGRAM}

    assert {key: found[key].goal for key in wanted} == wanted
    others = {(*key[:-1], "normal" if key[-1] == "rr" else "rr") for key in wanted}
    others -= {key for key in others if key[0] == "p99"}  # measured where it is judged alone
    assert all(found[key].goal is None for key in others)
    assert all(r.value is not None for r in found.values() if r.case.get("measure") == "time")


def rows_of(case, names):
    return [Row(case, name, (1.0,)) for name in names]


def test_every_other_figure_of_the_issue_is_a_ratio_with_its_goal():
    lists = [
        ratio
        for case in bench_fusion.cases(False)
        for ratio in bench_fusion.ratios(rows_of(case, (*bench_fusion.GLOO, *bench_fusion.SHM)))
    ]
    wrapper = bench_wrapper.ratios(rows_of({}, ("inner", *bench_wrapper.WAYS)))
    hosts = [
        (case["ranks"], ratio.name, ratio.goal)
        for case in bench_hierarchical.cases(False)
        if MIB <= case["nbytes"] <= 16 * MIB
        for ratio in bench_hierarchical.ratios(rows_of(case, bench_hierarchical.NAMES))
        if ratio.goal is not None
    ]

    assert [(r.name, r.goal) for r in lists if r.goal is not None] == LISTS
    assert {r.case["scheduling"] for r in lists} == {"rr", "normal"}
    assert all(r.case["scheduling"] == "rr" for r in lists if r.goal is not None)
    assert [(r.name, r.goal) for r in wrapper if r.goal is not None] == WRAPPER
    assert sorted(hosts) == sorted(HOSTS * 3)


def test_the_wrapper_is_measured_around_a_group_that_does_nothing(monkeypatch):
    monkeypatch.setattr(bench_wrapper, "_PAIRS", 3)

    with bench_wrapper.contenders({"nbytes": 64}) as named:
        found = {name: call() for name, call in named.items()}

    assert list(found) == ["inner", *bench_wrapper.WAYS]
    assert 0 < found["inner"] < 1
    assert all(-1 < seconds < 1 for seconds in found.values())


def test_a_difference_is_taken_in_pairs_that_a_drift_does_not_touch():
    clock = iter(range(1000))

    def slower_every_time(extra):
        return lambda: float(next(clock)) + extra

    found = _pairs.differences(slower_every_time(5.0), slower_every_time(0.0), 4)

    assert found == [6.0, 4.0, 6.0, 4.0]


def added(*samples):
    row = Row({}, "it", samples)
    ratios = _pairs.over_added([row], {}, "it", [("budget", 6.0, 1.0)])
    return {r.name: (r.value, r.goal) for r in ratios}


def test_a_difference_is_judged_by_what_it_can_be_at_most():
    assert added(1.0, 2.0, 1.5, 1.0, 1.5) == {"budget/it": (3.0, 1.0), "resolved/it": (1.0, None)}


def test_noise_meets_no_budget():
    assert added(-9.0, -1.0, 0.0, 1.0, 2.0)["budget/it"] == (6 / 9, 1.0)
    assert added(-9.0, -8.0, -8.0, -8.0, -8.0) == {
        "budget/it": (6 / 9, 1.0),
        "resolved/it": (0.0, None),
    }
    # of many samples a few stray ones do not count
    assert added(*[1.0] * 30, 99.0, -99.0)["budget/it"] == (6.0, 1.0)


def test_what_is_missing_has_no_ratio():
    assert added()["budget/it"] == (None, 1.0)


def test_a_quick_run_needs_no_real_time_priority_and_compiles_nothing():
    for bench in (bench_all_reduce, bench_collectives):
        wanted = "rr" if os.sched_getscheduler(0) == os.SCHED_RR else "normal"

        assert {c.get("scheduling", wanted) for c in bench.cases(True)} == {wanted}
    assert not _fleet.build_peers


@pytest.mark.timeout(90)
def test_ranks_are_measured_in_turn(only_gloo_and_shm):
    measured = Benchmark(
        "small", bench_all_reduce.contenders, [case_of()], bench_all_reduce.ratios, warmup=0
    ).launch(quick=True)

    times = {row["contender"]: row["samples"] for row in measured["rows"]}
    values = {ratio["name"]: ratio["value"] for ratio in measured["ratios"]}
    assert len(times["gloo"]) == len(times["shm-python plain"]) == 5
    assert all(0 < t < 10 for t in times["gloo"] + times["shm-python registered"])
    assert values["gloo/shm-python registered"] > 0
    assert values["deepspeed/shm-python plain"] is None


@pytest.mark.timeout(90)
def test_a_collective_of_every_kind_is_proven_right_before_it_is_timed(only_gloo_and_shm):
    for op in ("all_gather", "reduce_scatter"):
        with _runs.prepared(case_of(op=op), ["gloo", "shm-python registered"]) as found:
            assert all(isinstance(seconds, float) for seconds in found.values())


@pytest.mark.parametrize("op", ["all_reduce", "all_gather", "reduce_scatter"])
def test_a_call_that_does_nothing_is_found_wrong(op):
    found = _contenders.buffers(case_of(op=op), rank=1, world=2)
    calls = [lambda: None for _ in found.pairs]

    assert "buffer 0: element 0 is" in found.prepared(calls).check()


def test_wrong_results_of_ours_end_the_run_and_of_a_peer_leave_it_out():
    answers = [{"seconds": 1e-6}, {"wrong": "element 0 is 2.0, not 3.0"}]

    assert "element 0" in _runs._seconds("mpich", answers).reason
    with pytest.raises(DistributedRuntimeError, match=r"shm-native plain is wrong: element 0"):
        _runs._seconds("shm-native plain", answers)


class Together:
    """Ranks without processes: one contender whose call is `run`."""

    def __init__(self, run, world=2):
        self.rank = world - 1
        self._run = run

    def prepare(self, variant, case):
        found = _contenders.buffers(case, rank=self.rank, world=2)
        calls = [lambda x=x: self._run(x, found) for x, _ in found.pairs]
        return found.prepared(calls)


def alone(run, nbytes=KIB):
    barrier = type("Nobody", (), {"wait": lambda self: None})()
    rank = _rank.Rank(Together(run), barrier)
    (answer,) = rank.prepare(case_of(nbytes=nbytes), ["it"]).values()
    assert "seconds" in answer
    return rank


def reduce_alone(x, found):
    x.copy_(found.expected())


@pytest.mark.parametrize(("nbytes", "written"), [(KIB, True), (2 * MIB, False)])
def test_a_small_tensor_is_written_before_every_call_that_is_timed(nbytes, written):
    seen = []
    rank = alone(lambda x, found: (seen.append(x[1].item()), reduce_alone(x, found)), nbytes)
    seen.clear()

    rank.sample("it", 8, each=True)

    assert (set(seen) == {2 * _contenders.SCALE}) == written


@pytest.mark.parametrize("each", [True, False])
def test_what_is_reduced_in_place_stays_finite(each, monkeypatch):
    monkeypatch.setattr(_contenders, "TOUCHED_BYTES", 0)
    kept = []
    rank = alone(lambda x, found: kept.append(x.mul_(1.5)))

    for _ in range(5):
        rank.sample("it", 500, each=each)

    assert all(bool(x.isfinite().all()) for x in {id(x): x for x in kept}.values())


def test_a_busy_thread_shows_that_it_ran_and_ends():
    rank = alone(reduce_alone)
    assert rank.sample("it", 4, each=True)["turns"] is None

    rank.busy(True)
    turns = 0
    while not turns:
        turns = rank.sample("it", 50, each=True)["turns"]
    thread = rank._busy._thread
    rank.busy(False)

    assert not thread.is_alive()
    assert rank.sample("it", 4, each=True)["turns"] is None


def test_a_busy_thread_that_never_ran_is_an_error(monkeypatch):
    class Idle:
        def ask(self, do, **arguments):
            return [{"times": [1.0] * arguments["calls"], "turns": 0}] if do == "sample" else []

    monkeypatch.setattr(_runs, "ranks_of", lambda kind, world: Idle())
    tail = _runs.Tail(case_of("p99"), "gloo")

    assert tail.idle() == 1.0
    with pytest.raises(DistributedRuntimeError, match="gloo: the busy thread was never busy"):
        tail.busy()


def serve_one(rank, folder, pipe, result):
    """A rank whose contender `it` gives `result`, and is wrong where that is not 3."""
    x = [0]

    def timed_for(name, case):
        return _ranks.Timed(
            run=lambda: x.__setitem__(0, result),
            fill=lambda: x.__setitem__(0, 0),
            wrong=lambda: "" if x[0] == 3 else f"{x[0]} is not 3",
            rounds=2,
        )

    _ranks.serve(pipe, lambda: None, timed_for)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("result", [3, 4])
def test_a_wrong_result_of_any_contender_ends_the_run(result):
    ranks = _ranks.RankProcesses(1, serve_one, result)
    try:
        if result == 3:
            named = ranks.measured(["it"], {"scheduling": "normal"})
            assert named["it"]() > 0
        else:
            with pytest.raises(RuntimeError, match=r"it in .*: ArithmeticError: 4 is not 3"):
                ranks.measured(["it"], {"scheduling": "normal"})
    finally:
        ranks.close()


def test_sums_over_hosts_and_results_of_the_adapter_are_compared():
    wanted = torch.tensor([10.0, 20.0, 70.0])
    bound = bench_hierarchical._BOUNDS["hier_int8"]

    assert bench_hierarchical.wrong_sum(wanted + 0.5, wanted, bound) == ""
    assert "element 0 is 10.5, not 10.0" in bench_hierarchical.wrong_sum(wanted + 0.5, wanted, 0.0)
    # without the rank that gives least
    assert bench_hierarchical.wrong_sum(wanted - wanted / 10, wanted, bound)
    assert _adapter.wrong_part("all_gather", torch.tensor([1.0, 1.0, 2.0, 2.0])) == ""
    assert "has 0.0 where 2" in _adapter.wrong_part("all_gather", torch.tensor([1.0, 0.0]))
    assert "has 1.0 where 2" in _adapter.wrong_part("all_reduce", torch.tensor([2.0, 1.0]))


@pytest.mark.timeout(90)
def test_a_killed_rank_is_named_by_ours(ranks):
    with bench_all_reduce.contenders(case_of("lost")) as named:
        seconds = named["shm-python"]()

    assert 0 <= seconds < 2


@pytest.mark.timeout(60)
def test_an_error_on_a_rank_is_the_error_of_the_launch(ranks):
    gloo = _fleet.ranks_of("gloo", 2)

    with pytest.raises(DistributedRuntimeError, match="unknown request 'nonsense'"):
        gloo.ask("nonsense")

    _fleet.close_all()
    assert all(process.returncode is not None for process in gloo._processes)


def test_an_absent_peer_says_what_to_install(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)

    assert _fleet.missing("openmpi") == "mpi4py is not installed"
    assert _deepspeed.missing(build=True) == "deepspeed is not installed"
