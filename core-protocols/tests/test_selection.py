"""`auto`: one answer on every rank, and a reason for every candidate."""

import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import EntryPoint, entry_points

import pytest

from sagellm.core.protocols import (
    BackendSpec,
    BackendUnavailableError,
    Capabilities,
    CollectiveMismatchError,
    CommTimeoutError,
    ConfigError,
    DistributedRuntimeError,
    Probe,
)
from sagellm.core.protocols.config import load_all
from sagellm.core.protocols.registry import Registry
from sagellm.core.protocols.selection import SelectionSettings, backend_registry, select_backend


class MemoryStore:
    """What selection needs of a torch store."""

    def __init__(self):
        self.values = {}
        self.lock = threading.Lock()

    def add(self, key, amount):
        with self.lock:
            self.values[key] = self.values.get(key, 0) + amount
            return self.values[key]

    def set(self, key, value):
        self.values[key] = value

    def check(self, keys):
        return all(key in self.values for key in keys)

    def get(self, key):
        return self.values[key]


def spec(name, kinds=("cpu",), priority=1, found=True, why="it is here", c10d=None, hint=""):
    return BackendSpec(
        name=name,
        device_types=kinds,
        c10d_name=c10d or name,
        priority=priority,
        capabilities=Capabilities(),
        probe=lambda: Probe(found, why),
        load=lambda: pytest.fail("selection must not load"),
        install_hint=hint,
    )


def candidates(*specs):
    registry = Registry(
        "sagellm.comm.tests_without_entries", install_hints={"hccl": "pip install x"}
    )
    for found in specs:
        registry.add(found.name, found)
    return registry


@pytest.fixture(autouse=True)
def _no_setting(monkeypatch):
    monkeypatch.delenv("SAGELLM_COMM_BACKEND", raising=False)


def choose(*specs, **arguments):
    return select_backend(candidates=candidates(*specs), **arguments)


def test_device_comes_before_the_cpu_and_priority_decides():
    found = choose(
        spec("gloo", priority=500),
        spec("slow", ("npu",), 1),
        spec("hccl", ("npu",), 2),
        spec("nccl", ("cuda",), 9, found=False, why="no device", hint="pip install torch"),
        spec("mock", priority=-1),
    )
    assert found.spec.name == "hccl"
    assert found.device_type == "npu"
    assert found.rejected["nccl"] == "no device; pip install torch"
    assert found.rejected["mock"] == "taken only by name"
    lines = found.explain().splitlines()
    assert lines[0].startswith("hccl: taken for npu: npu is present")
    assert {line.split(":")[0] for line in lines[1:]} == {"gloo", "slow", "nccl", "mock"}


def test_cpu_takes_the_highest_priority():
    found = choose(spec("gloo", priority=10), spec("shm", priority=20))
    assert found.spec.name == "shm"
    assert "shm comes first" in found.rejected["gloo"]


def test_device_type_restricts_the_choice():
    found = choose(spec("gloo"), spec("hccl", ("npu",)), device_type="cpu")
    assert found.spec.name == "gloo"
    assert found.rejected["hccl"] == "serves npu, not cpu"


def test_nothing_that_fits_says_why_for_each():
    with pytest.raises(BackendUnavailableError, match=r"for cuda .* gloo: serves cpu, not cuda"):
        choose(spec("gloo"), device_type="cuda")
    with pytest.raises(BackendUnavailableError, match="none is installed"):
        choose()


def test_setting_beats_everything_and_is_checked(monkeypatch):
    both = (spec("gloo"), spec("mock", priority=-1))
    assert choose(*both, setting="mock").spec.name == "mock"
    monkeypatch.setenv("SAGELLM_COMM_BACKEND", "Mock ")
    assert choose(*both).spec.name == "mock"
    assert choose(*both, setting="auto").spec.name == "gloo"
    with pytest.raises(ConfigError, match=r"'hccl'.*pip install x"):
        choose(*both, setting="hccl")
    with pytest.raises(BackendUnavailableError, match="'gloo' was asked for: broken"):
        choose(spec("gloo", found=False, why="broken"), setting="gloo")
    with pytest.raises(ConfigError, match="serves cpu, not npu"):
        choose(*both, setting="gloo", device_type="npu")


def test_probe_that_raises_is_a_refusal():
    bad = spec("bad")
    object.__setattr__(bad, "probe", lambda: 1 / 0)
    found = choose(spec("gloo"), bad)
    assert found.rejected["bad"] == "its probe failed: ZeroDivisionError: division by zero"


def test_library_of_a_group_is_kept():
    dist = pytest.importorskip("torch.distributed")
    group = dist.ProcessGroup(dist.HashStore(), 0, 1)
    import torch

    kind = dist.ProcessGroup.BackendType.GLOO
    gloo = dist.ProcessGroupGloo(dist.HashStore(), 0, 1)
    group._register_backend(torch.device("cpu"), kind, gloo)
    group._set_default_backend(kind)
    found = choose(spec("gloo", priority=1), spec("shm", priority=9), group=group)
    assert found.spec.name == "gloo"
    assert "already runs gloo" in found.reason
    assert "the process group runs gloo on cpu" in found.rejected["shm"]


def together(specs_by_rank, **arguments):
    """Outcome of every rank that takes part, each in a thread."""
    store = MemoryStore()

    def one(rank):
        try:
            found = choose(
                *specs_by_rank[rank], store=store, rank=rank, size=len(specs_by_rank), **arguments
            )
        except (RuntimeError, TimeoutError) as e:
            return e
        return found.spec.name

    with ThreadPoolExecutor(len(specs_by_rank)) as pool:
        present = [r for r, specs in enumerate(specs_by_rank) if specs is not None]
        return list(pool.map(one, present))


def test_ranks_agree():
    assert together([[spec("gloo")]] * 3) == ["gloo"] * 3


def test_ranks_that_differ_are_named_to_all():
    answers = together([[spec("gloo")], [spec("gloo"), spec("hccl", ("npu",))]])
    for error in answers:
        assert isinstance(error, CollectiveMismatchError)
        assert "rank 0: gloo on cpu" in str(error)
        assert "rank 1: hccl on npu" in str(error)
        assert set(error.calls) == {0, 1}


def test_rank_without_any_backend_is_named_to_all():
    first, second = together([[spec("gloo")], [spec("gloo", found=False, why="no torch")]])
    assert isinstance(first, BackendUnavailableError)
    assert "rank 1: no backend can run here: gloo: no torch" in str(first)
    assert isinstance(second, BackendUnavailableError)


def test_rank_that_never_answers_is_named():
    (error,) = together([[spec("gloo")], None], timeout_s=0.05)
    assert isinstance(error, CommTimeoutError)
    assert "ranks [1] of 2" in str(error)


def test_second_choice_does_not_read_the_first_ones_answers():
    store = MemoryStore()
    for name in ("gloo", "shm"):
        with ThreadPoolExecutor(2) as pool:
            found = pool.map(
                lambda rank, name=name: choose(spec(name), store=store, rank=rank, size=2), (0, 1)
            )
            assert [f.spec.name for f in found] == [name, name]


def test_several_ranks_need_a_store_that_works():
    with pytest.raises(ConfigError, match="pass the store"):
        choose(spec("gloo"), size=2)
    broken = MemoryStore()
    broken.set = lambda *_: (_ for _ in ()).throw(RuntimeError("connection reset"))
    with pytest.raises(DistributedRuntimeError, match="store shared by 2 ranks failed"):
        choose(spec("gloo"), size=2, store=broken)


DOMESTIC = "bccl cncl eccl hccl hygon iluvatar kunlun mccl metax sccl tccl".split()
OURS = ["gloo", "hier", "mock", "nccl", "rccl", "shm"]


@pytest.fixture
def installed(monkeypatch):
    """Lets the registry see these backends and no others."""

    def only(*names):
        entries = [EntryPoint(name, "nowhere:SPEC", "sagellm.comm.backends") for name in names]
        monkeypatch.setattr("sagellm.core.protocols.registry.entry_points", lambda group: entries)

    return only


@pytest.mark.parametrize(
    ("names", "line"),
    [(DOMESTIC, "sagellm-comm-domestic"), (OURS, "sagellm-comm-collective-ops")],
)
def test_absent_backend_names_the_package_that_brings_it(installed, names, line):
    installed()
    for name in names:
        with pytest.raises(ConfigError, match=f"`pip install {line}` brings it"):
            backend_registry().load(name)


def test_unknown_backend_lists_what_exists_and_what_to_install(installed):
    installed(*OURS)
    with pytest.raises(ConfigError) as caught:
        backend_registry().load("nonesuch")
    text = str(caught.value)
    assert "installed: gloo, hier, mock, nccl, rccl, shm" in text
    assert all(f"{name} (`pip install sagellm-comm-domestic`)" in text for name in DOMESTIC)
    assert "collective-ops" not in text


def test_every_domestic_backend_has_its_hint():
    found = {e.name for e in entry_points(group="sagellm.comm.backends")}
    assert found <= {*DOMESTIC, *OURS}


def test_setting_has_a_type_a_default_and_an_origin(tmp_path):
    assert SelectionSettings.load({}).backend == "auto"
    found = SelectionSettings.load({"SAGELLM_COMM_BACKEND": " Gloo"})
    assert (found.backend, found.origin("backend")) == ("gloo", "environment SAGELLM_COMM_BACKEND")
    both = {"SAGELLM_COMM_BACKEND": "gloo", "SAGELLM_COMM_SELECTION_BACKEND": "mock"}
    assert SelectionSettings.load(both).backend == "gloo"
    file = tmp_path / "comm.yaml"
    file.write_text("selection: {backend: mock}")
    assert SelectionSettings.load({}, file).backend == "mock"
    assert load_all(both, file)["selection"].backend == "gloo"
    with pytest.raises(ConfigError, match="did you mean 'SAGELLM_COMM_BACKEND'"):
        load_all({"SAGELLM_COMM_BACKENT": "gloo"})
