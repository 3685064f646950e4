"""What is missing is said: plug-in, runtime, device, library. Each in a process of its own."""

import pytest

from sagellm.comm.domestic import create_domestic_backend, find_vendor, probe_in_process
from sagellm.comm.domestic.runtime import missing_piece, unavailable
from sagellm.core.protocols import BackendUnavailableError, ConfigError

NO_CANN = """
    def _autoload(): pass
    raise ImportError("libhccl.so: cannot open shared object file: No such file", name="_C")
"""
ASK = """
    import sys
    from sagellm.comm.domestic import create_domestic_backend
    from sagellm.core.protocols import BackendUnavailableError
    clean = "torch" not in sys.modules
    try:
        create_domestic_backend({name!r})
    except BackendUnavailableError as e:
        import torch
        import os
        answer([clean, str(e), type(e.__cause__).__name__, torch.ones(2).sum().item(),
                os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD")])
"""


def ask(name):
    return ASK.format(name=name)


def test_a_plug_in_that_is_not_installed_is_named_with_what_to_install():
    with pytest.raises(BackendUnavailableError, match=r"torch_npu is not installed; .*set_env"):
        create_domestic_backend("hccl")


@pytest.mark.parametrize("name", ["hygon", "metax", "iluvatar", "kunlun"])
def test_another_vendors_torch_is_told_apart(name):
    with pytest.raises(BackendUnavailableError, match="this torch belongs to"):
        create_domestic_backend(name)


def test_auto_without_any_vendor_says_why_for_each(monkeypatch):
    monkeypatch.delenv("SAGELLM_COMM_BACKEND", raising=False)
    with pytest.raises(BackendUnavailableError, match=r"no domestic accelerator(.|\n)*not cncl: "):
        create_domestic_backend("auto")


@pytest.mark.parametrize("arguments", [{"timeout_s": 0}, {"options": {"nonsense": 1}}])
def test_arguments_are_checked_before_anything_is_loaded(arguments):
    with pytest.raises(ConfigError):
        create_domestic_backend("hccl", **arguments)


def test_torch_survives_a_plug_in_that_it_loads_itself_without_its_runtime(python, plugin):
    site = plugin("torch_npu", NO_CANN, autoload=True)
    clean, text, cause, total, autoload = python(ask("hccl"), path=site)

    assert clean, "importing the package imported torch"
    assert "Huawei Ascend" in text
    assert "import torch_npu" in text
    assert "libhccl.so is missing: source the set_env.sh" in text
    assert cause == "ImportError"
    assert total == 2.0
    assert autoload is None


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "raise Exception('ASCEND_OPP_PATH environment variable is not set.')",
            "ASCEND_OPP_PATH is missing: source the set_env.sh",
        ),
        ("import no_such_part", "module no_such_part is missing too"),
        ("pass", "torch has no device 'npu': the one slot for such devices is held by nobody"),
    ],
)
def test_a_plug_in_may_fail_in_any_way(python, plugin, source, words):
    text = python(ask("hccl"), path=plugin("torch_npu", source))[1]

    assert words in text


@pytest.mark.usefixtures("emulation")
def test_a_runtime_without_a_device_names_what_may_hide_it(python):
    program = """
        from sagellm.comm.domestic import create_domestic_backend, emulate, find_vendor
        from sagellm.comm.domestic.detect import probe_vendor
        emulate("hccl", devices=0)
        found = [probe_vendor(find_vendor("hccl")).reason, probe_vendor(find_vendor("cncl")).reason]
        for name in ("hccl", "cncl"):
            try:
                create_domestic_backend(name)
            except Exception as e:
                found.append(f"{type(e).__name__}: {e}")
        answer(found)
    """
    seen = python(program, ASCEND_RT_VISIBLE_DEVICES="9")

    assert "sees 0 npu devices" in seen[0]
    assert seen[1] == "torch_mlu is not installed"
    assert seen[2].startswith("BackendUnavailableError")
    assert "ASCEND_RT_VISIBLE_DEVICES='9' may hide it" in seen[2]
    assert "npu-smi" in seen[2]
    assert "torch_mlu is not installed" in seen[3]


@pytest.mark.usefixtures("emulation")
def test_a_process_holds_one_vendor_and_a_world_of_one_needs_no_group(python, plugin):
    program = """
        import torch
        from sagellm.comm.domestic import create_domestic_backend, emulate, find_vendor
        from sagellm.comm.domestic.detect import probe_vendor
        from sagellm.core.protocols import CommError
        def said(call):
            try:
                call()
            except CommError as e:
                return f"{type(e).__name__}: {e}"
        row = emulate("mccl", devices=2)
        backend = create_domestic_backend("mccl", device="musa:1", self_test=True)
        x = torch.ones(3, device="musa")
        from sagellm.core.protocols.selection import select_backend
        chosen = select_backend(setting="auto")
        answer({
            "auto": [chosen.spec.name, chosen.device_type, chosen.spec.load().__name__],
            "rejected": chosen.rejected["hccl"],
            "group": backend.process_group is None,
            "device": str(backend.device),
            "sum": backend.all_reduce(x).cpu().tolist(),
            "other": said(lambda: create_domestic_backend("cncl")),
            "probe": probe_vendor(find_vendor("cncl")).reason,
            "again": said(lambda: emulate("cncl")),
            "cuda": said(lambda: emulate("metax")),
            "index": said(lambda: create_domestic_backend("mccl", device=7)),
            "kind": said(lambda: create_domestic_backend("mccl", device="cpu")),
            "word": said(lambda: create_domestic_backend("mccl", device="npux:0")),
            "comm": said(lambda: backend.split([0]).close()),
        })
    """
    seen = python(program, path=plugin("torch_mlu", ""))

    assert seen["auto"] == ["mccl", "musa", "DomesticBackend"]
    assert "torch_npu is not installed" in seen["rejected"]
    assert seen["group"]
    assert seen["device"] == "musa:1"
    assert seen["sum"] == [1.0, 1.0, 1.0]
    assert "held by 'musa'" in seen["other"]
    assert "this process has the device 'musa' already" in seen["probe"]
    assert "has the device 'musa' already" in seen["again"]
    assert "cuda is torch's own device type" in seen["cuda"]
    assert "musa:7 is not in 0..1" in seen["index"]
    assert "serves musa, not cpu" in seen["kind"]
    assert "ConfigError" in seen["word"]
    assert seen["comm"] is None


def test_half_a_rendezvous_is_refused(python, emulation):
    program = """
        from sagellm.comm.domestic import create_domestic_backend, emulate
        emulate("hccl")
        try:
            create_domestic_backend("hccl")
        except Exception as e:
            answer(f"{type(e).__name__}: {e}")
    """
    seen = python(program, RANK="0", WORLD_SIZE="2")

    assert seen.startswith("ConfigError: RANK, WORLD_SIZE set but not MASTER_ADDR, MASTER_PORT")


def test_ranks_that_never_come_are_waited_for_no_longer_than_asked(python, emulation):
    program = """
        import time
        from torch.distributed import TCPStore
        from sagellm.comm.domestic import create_domestic_backend, emulate
        import os
        emulate("hccl")
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.environ["MASTER_PORT"] = str(store.port)
        start = time.monotonic()
        try:
            create_domestic_backend("hccl", timeout_s=1.0)
        except Exception as e:
            answer([type(e).__name__, str(e), time.monotonic() - start])
    """
    kind, text, seconds = python(
        program, RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
        TORCHELASTIC_USE_AGENT_STORE="True", HCCL_CONNECT_TIMEOUT="120", GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip

    assert kind == "CommTimeoutError"
    assert "HCCL_CONNECT_TIMEOUT=120" in text
    assert seconds < 30


def test_a_question_to_a_plug_in_ends_with_its_process(plugin, monkeypatch):
    row = find_vendor("hccl")
    root = plugin("torch_npu", NO_CANN)
    probe = probe_in_process(row, environ={"PYTHONPATH": str(root)})
    assert not probe.available
    assert "libhccl.so is missing" in probe.reason

    (root / "torch_npu" / "__init__.py").write_text(
        "import torch, types\n"
        "torch.npu = types.SimpleNamespace(is_available=lambda: True, device_count=lambda: 8)\n"
    )
    assert probe_in_process(row, environ={"PYTHONPATH": str(root)}).reason.endswith("8 npu devices")

    (root / "torch_npu" / "__init__.py").write_text("import os; os._exit(9)\n")
    assert "code 9" in probe_in_process(row, environ={"PYTHONPATH": str(root)}).reason

    (root / "torch_npu" / "__init__.py").write_text(
        "import threading; threading.Event().wait(60)\n"
    )
    late = probe_in_process(row, environ={"PYTHONPATH": str(root)}, timeout_s=0.2)
    assert "did not answer within 0.2 s" in late.reason


@pytest.mark.parametrize(
    ("vendor", "text", "piece"),
    [
        ("hccl", "libascendcl.so.1: cannot open", "libascendcl.so"),
        ("eccl", "libtopsrt.so: cannot open shared object file", "libtopsrt.so"),
        ("hccl", "libfoo.so.2: cannot open", "libfoo.so.2"),
        ("hccl", "Two accelerators cannot be used at the same time", "one accelerator"),
    ],
)
def test_the_missing_library_is_found_in_the_text(vendor, text, piece):
    assert missing_piece(find_vendor(vendor), text)[0] == piece


def test_an_unknown_failure_still_says_what_to_do():
    assert missing_piece(find_vendor("hccl"), "the sky fell") is None
    error = unavailable(find_vendor("hccl"), "import torch_npu", RuntimeError("the sky fell"))
    assert "the sky fell; pip install torch-npu" in str(error)
