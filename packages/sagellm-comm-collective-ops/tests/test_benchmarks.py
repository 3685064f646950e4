"""The benchmarks of collectives: every promised ratio, and real ranks on a small case."""

import contextlib
import importlib.metadata
import os

import pytest

from sagellm.comm.collective_ops.benchmarks import (
    _contenders,
    _deepspeed,
    _fleet,
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
        (measure, op, dtype, nbytes, name.format(f"shm-{engine}"), "rr"): goal
        for measure, op, dtype, nbytes, name, *goals in PROMISED
        for engine, goal in zip(("python", "native"), goals, strict=True)
    }
    wanted |= {("program", "all_reduce", "float32", KIB, name, "rr"): g for name, g in PROGRAM}

    assert {key: found[key].goal for key in wanted} == wanted
    assert all((*key[:-1], "normal") in found for key in wanted)
    assert all(r.value is not None for r in found.values() if r.case.get("measure") == "time")


def rows_of(case, names):
    return [Row(case, name, (1.0,)) for name in names]


def test_every_other_figure_of_the_issue_is_a_ratio_with_its_goal():
    case = {"tensors": 200}
    lists = bench_fusion.ratios(rows_of(case, (*bench_fusion.GLOO, *bench_fusion.SHM)))
    wrapper = bench_wrapper.ratios(rows_of(case, ("inner", *bench_wrapper.WAYS)))
    hosts = [
        (case["ranks"], ratio.name, ratio.goal)
        for case in bench_hierarchical.cases(False)
        if MIB <= case["nbytes"] <= 16 * MIB
        for ratio in bench_hierarchical.ratios(rows_of(case, bench_hierarchical.NAMES))
        if ratio.goal is not None
    ]

    assert [(r.name, r.goal) for r in lists if r.goal is not None] == LISTS
    assert [(r.name, r.goal) for r in wrapper if r.goal is not None] == WRAPPER
    assert sorted(hosts) == sorted(HOSTS * 3)


def test_the_wrapper_is_measured_around_a_group_that_does_nothing(monkeypatch):
    monkeypatch.setattr(bench_wrapper, "_CALLS", 3)

    with bench_wrapper.contenders({"nbytes": 64}) as named:
        found = {name: call() for name, call in named.items()}

    assert list(found) == ["inner", *bench_wrapper.WAYS]
    assert all(0 < seconds < 1 for seconds in found.values())


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
