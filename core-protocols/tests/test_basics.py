"""Errors, works, registry and the small types."""

import asyncio
import threading
from importlib.metadata import EntryPoint

import pytest

from sagellm.core.protocols import (
    Axis,
    CacheGroup,
    CompletedWork,
    Device,
    KVLayout,
    ReduceOp,
    Shard,
    TopologyInfo,
    TransferState,
    Work,
    errors,
)
from sagellm.core.protocols.registry import Registry


def test_errors_carry_what_callers_need():
    lost = errors.PeerLostError(rank=3)
    mismatch = errors.CollectiveMismatchError("differ", calls={0: "a", 1: "b"})
    layout = errors.LayoutMismatchError("no", ours="x", theirs="y")
    kv = errors.KVTransferError("gone", key=("a", 1), cause="peer_lost", invalid_blocks=[4, 5])

    assert (str(lost), lost.rank) == ("rank 3 stopped answering", 3)
    assert mismatch.calls == {0: "a", 1: "b"}
    assert str(layout) == "no; ours: x; theirs: y"
    assert (kv.key, kv.cause, kv.invalid_blocks) == (("a", 1), "peer_lost", (4, 5))


def test_a_completed_work_is_a_work():
    work = CompletedWork(3)

    assert isinstance(work, Work)
    assert work.synchronize() == work.result() == 3
    assert asyncio.run(awaited(work)) == 3
    assert work.get_future().wait() == 3


def test_a_failed_work_raises_everywhere():
    work = CompletedWork(None, errors.PeerLostError(rank=1))

    assert isinstance(work.exception(), errors.PeerLostError)
    for call in (work.wait, work.result, work.synchronize, lambda: asyncio.run(awaited(work))):
        with pytest.raises(errors.PeerLostError):
            call()


async def awaited(work):
    return await work


def test_reductions_are_known_by_many_names():
    class Torchlike:
        name = "MAX"

    assert ReduceOp.of("avg") is ReduceOp.AVG
    assert ReduceOp.of(ReduceOp.BAND) is ReduceOp.BAND
    assert ReduceOp.of(Torchlike()) is ReduceOp.MAX
    with pytest.raises(errors.ConfigError, match="'7' is not one of"):
        ReduceOp.of(7)


def group(name, **changes):
    axes: tuple[Axis, ...] = ("block", "kv", "token", "head", "dim")
    values = {"kind": "kv", "layers": ("0", "1"), "axes": axes, "block_shape": (2, 16, 4, 64)}
    return CacheGroup(name, dtype="float16", page_tokens=16, **{**values, **changes})


def test_names_of_pool_tensors_follow_the_layout():
    assert group("a").tensor_names == ("0", "1")
    assert group("a", parts=("k", "v")).tensor_names == ("0.k", "0.v", "1.k", "1.v")
    assert group("a", axes=("layer", "block")).tensor_names == ("a",)
    assert group("a", axes=("layer", "block"), parts=("k",)).tensor_names == ("a.k",)


def test_a_layout_says_everything_that_must_fit():
    layout = KVLayout((group("a", shard=Shard("head", 1, 4)), group("b")), model="llama")

    assert layout.layers == ("0", "1", "0", "1")
    for word in ("llama", "a: kv 2 layers float16", "head 1/4", "page_tokens=16"):
        assert word in layout.describe()


def test_terminal_states_are_terminal():
    assert [s for s in TransferState if s.terminal] == [
        TransferState.RELEASED,
        TransferState.FAILED,
        TransferState.CANCELLED,
    ]


def test_accelerators_are_counted():
    info = TopologyInfo(devices=(Device("a", "gpu"), Device("b", "nic"), Device("c", "npu")))

    assert info.num_devices == 2
    assert info.find("b").kind == "nic"
    assert info.find("z") is None


@pytest.fixture
def registry(monkeypatch):
    points = [
        EntryPoint("good", "json:dumps", "group"),
        EntryPoint("bad", "no_such_module_here:x", "group"),
    ]
    monkeypatch.setattr("sagellm.core.protocols.registry.entry_points", lambda group: points)
    return Registry("group", install_hints={"absent": "pip install absent"})


def test_one_broken_plugin_breaks_no_other(registry, caplog):
    assert registry.names() == ("bad", "good")
    assert list(registry.load_all()) == ["good"]
    assert "no_such_module_here" in registry.broken()["bad"]
    assert "bad" in caplog.text
    with pytest.raises(errors.BackendUnavailableError, match="import failed"):
        registry.load("bad")


def test_an_unknown_name_says_what_exists_and_what_to_install(registry):
    with pytest.raises(errors.ConfigError, match=r"installed: bad, good; did you mean 'good'"):
        registry.load("goood")
    with pytest.raises(errors.ConfigError, match="`pip install absent` brings it"):
        registry.load("absent")
    with pytest.raises(
        errors.ConfigError, match=r"can be installed: absent \(`pip install absent`"
    ):
        registry.load("zzz")


def test_a_plugin_of_this_process_hides_an_installed_one(registry):
    registry.add("good", 7)
    registry.add("mine", 8)

    assert registry.load("good") == 7
    assert registry.names() == ("bad", "good", "mine")


def test_plugins_are_loaded_once_by_many_threads(registry):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(registry.load("good"))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)

    assert len({id(f) for f in found}) == 1
