"""Making a backend: names, groups, the environment, and what is missing here."""

import os
import socket
import sys
import threading
from importlib.metadata import entry_points

import pytest
import torch

from sagellm.comm.collective_ops import (
    GlooBackend,
    MockBackend,
    NCCLBackend,
    RCCLBackend,
    ShmBackend,
    create_comm_backend,
    explain_selection,
)
from sagellm.core.protocols import (
    BackendUnavailableError,
    CommBackendProtocol,
    CommTimeoutError,
    ConfigError,
)

needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")


@pytest.mark.parametrize(
    ("name", "kind"), [("gloo", GlooBackend), ("mock", MockBackend), ("shm", ShmBackend)]
)
def test_named_backend_is_a_world_of_one(name, kind):
    with create_comm_backend(name) as backend:
        assert isinstance(backend, kind)
        assert isinstance(backend, CommBackendProtocol)
        assert (backend.name, backend.rank, backend.size) == (name, 0, 1)
        assert backend.global_ranks == (0,)
        assert backend.process_group is None
        x = torch.arange(3.0)
        assert backend.all_reduce(x) is x
        assert backend.all_reduce(x, async_op=True).wait() is x
        assert x.tolist() == [0, 1, 2]
        assert backend.all_gather(x)[0].tolist() == [0, 1, 2]
        assert backend.reduce_scatter([x]).tolist() == [0, 1, 2]
        assert backend.all_to_all([x])[0].tolist() == [0, 1, 2]
        assert backend.gather(x, 0)[0].tolist() == [0, 1, 2]
        assert backend.scatter(torch.empty(3), [x], 0).tolist() == [0, 1, 2]
        assert backend.barrier() is None
        assert backend.split([0]).size == 1
        with pytest.raises(ConfigError, match="this rank itself"):
            backend.send(x, 0)


@needs_no_cuda
def test_auto_takes_shm_on_a_host_without_devices():
    assert create_comm_backend().name == "shm"
    text = explain_selection().explain()
    assert text.startswith("shm: taken for cpu")
    assert "gloo: not taken: shm comes first" in text
    assert "mock: not taken: taken only by name" in text
    assert "nccl: not taken: " in text


def test_setting_overrides_auto(monkeypatch):
    monkeypatch.setenv("SAGELLM_COMM_BACKEND", "mock")
    assert create_comm_backend("auto").name == "mock"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("hccl", "pip install sagellm-comm-domestic"),
        ("cncl", "pip install sagellm-comm-domestic"),
        ("glooo", "did you mean 'gloo'"),
        ("nonesuch", "installed: gloo, hier, mock, nccl, rccl, shm"),
    ],
)
def test_unknown_name_says_what_exists_and_what_to_install(name, hint, monkeypatch):
    """As where only this package is installed."""

    def ours(*, group):
        return [e for e in entry_points(group=group) if "collective_ops" in e.value]

    monkeypatch.setattr("sagellm.core.protocols.registry.entry_points", ours)
    with pytest.raises(ConfigError) as caught:
        create_comm_backend(name)
    assert name in str(caught.value)
    assert hint in str(caught.value)


@needs_no_cuda
@pytest.mark.parametrize("kind", [NCCLBackend, RCCLBackend])
def test_device_backend_without_device_says_what_is_missing_and_what_next(kind):
    with pytest.raises(BackendUnavailableError) as caught:
        kind()
    text = str(caught.value)
    assert f"backend {kind.default_spec.name!r} cannot run here: " in text
    # What is missing depends on the torch build: a library of it, or the device.
    assert kind.default_spec.probe().reason in text
    assert f"next step: {kind.default_spec.install_hint}" in text
    assert "create_comm_backend('auto')" in text
    with pytest.raises(BackendUnavailableError):
        create_comm_backend(kind.default_spec.name)


def test_package_lists_and_gives_every_public_name():
    import sagellm.comm.collective_ops as package

    assert set(package.__all__) <= set(dir(package))
    assert all(getattr(package, name) is not None for name in package.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        package.nonsense  # noqa: B018


def test_unknown_options_and_devices_are_refused():
    with pytest.raises(ConfigError, match=r"no option speed; known: algorithms, .*check_calls"):
        create_comm_backend("gloo", options={"speed": 11})
    with pytest.raises(ConfigError, match="mock has no option speed"):
        create_comm_backend("mock", options={"speed": 11})
    with pytest.raises(ConfigError, match="gloo serves cpu, not cuda"):
        create_comm_backend("gloo", device="cuda")
    with pytest.raises(ConfigError, match="mock serves cpu"):
        create_comm_backend("mock", device="meta")
    with pytest.raises(ConfigError, match="timeout_s must be above 0"):
        create_comm_backend("gloo", timeout_s=0)


def test_half_an_environment_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="MASTER_ADDR, MASTER_PORT missing"):
        create_comm_backend("gloo")


@pytest.mark.parametrize(("rank", "text"), [("2", "not in 0..1"), ("x", "not an integer")])
def test_bad_environment_is_refused(monkeypatch, rank, text):
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(ConfigError, match=text):
        create_comm_backend("gloo")


def test_rank_whose_world_never_comes_gets_a_deadline(monkeypatch):
    with socket.socket() as held:  # bound and not listening: nobody answers there
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        for name, value in {
            "RANK": "1",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(CommTimeoutError, match=f"rank 1 of 2 .* 127.0.0.1:{port}"):
            create_comm_backend("gloo", timeout_s=1)


# -- in the pool --------------------------------------------------------------------------


def over_the_default_group(b):
    with create_comm_backend() as backend:
        first = (backend.name, backend.size, backend.all_reduce(torch.ones(1)).item())
    # close leaves a group alone that it did not make
    with create_comm_backend("gloo", group=b.process_group) as backend:
        return first, backend.all_reduce(torch.ones(1)).item(), explain_selection().reason


def ranks_that_disagree(b):
    os.environ["SAGELLM_COMM_BACKEND"] = "mock" if b.rank else "gloo"
    try:
        create_comm_backend()
    except RuntimeError as e:
        return type(e).__name__, str(e)
    finally:
        del os.environ["SAGELLM_COMM_BACKEND"]
    raise AssertionError("nobody noticed")


def test_auto_keeps_the_library_of_the_default_group(gloo_pools):
    for first, total, reason in gloo_pools(2).run(over_the_default_group):
        assert first == ("gloo", 2, 2.0)
        assert total == 2.0
        assert "already runs gloo" in reason


def test_auto_refuses_to_differ_between_ranks(gloo_pools):
    for kind, text in gloo_pools(2).run(ranks_that_disagree):
        assert kind == "CollectiveMismatchError"
        assert "rank 0: gloo on cpu" in text
        assert "rank 1: mock on cpu" in text


def test_world_from_the_environment(tmp_path):
    """Two fresh processes under the variables that torchrun sets; twice, on one store."""
    import subprocess
    import sys

    script = tmp_path / "world.py"
    script.write_text(
        "import torch\n"
        "from sagellm.comm.collective_ops import create_comm_backend\n"
        "for name in ('auto', 'gloo'):\n"
        "    with create_comm_backend(name, timeout_s=30) as b:\n"
        "        print(name, b.name, b.size, int(b.all_reduce(torch.ones(1) + b.rank)))\n"
        "        b.barrier()\n"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    base = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script)],
            env={**base, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in ranks]
    assert outputs == ["auto shm 2 3\ngloo gloo 2 3\n"] * 2


def test_importing_starts_nothing():
    names = {thread.name for thread in threading.enumerate()}
    assert not [name for name in names if name.startswith("sagellm-comm-watchdog")]


def test_windows_is_refused_before_anything_else(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")

    with pytest.raises(ConfigError, match=r"Windows .*use Linux"):
        create_comm_backend("no-such-backend")
