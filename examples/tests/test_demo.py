"""The whole demo: tokens, files, failures, and what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import disaggregated_serving
import pytest
import torch
from llama_tp import TINY_LLAMA
from rich.console import Console
from safetensors.torch import load_file, save_file
from serving.messages import Admit, Decode, Failed, Job, LayerSent, Prefill, Stop, Token
from serving.processes import Fleet, RankLostError
from serving.progress import Progress
from serving.prompts import load_prompts
from serving.router import Router

DEMO = Path(disaggregated_serving.__file__)
PROMPTS = ("def read(self, size=-1):\n    ", "The compiler checks that every " * 12)
DEADLINE_S = 200.0
LEARNS_WITHIN_S = 2.0
ORPHANS_END_WITHIN_S = 5.0

# each starts processes that import torch: seconds on an idle machine, far more on a busy one
pytestmark = pytest.mark.timeout(300)
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def demo(tmp_path, capsys, monkeypatch):
    """`demo(*arguments)` gives (exit status, the JSON result or None, output)."""
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments, prompts=PROMPTS):
        result = tmp_path / "result.json"
        given = [f"--prompt={p}" for p in prompts]
        status = disaggregated_serving.main(
            [*given, f"--out={tmp_path / 'out'}", f"--json={result}", *map(str, arguments)]
        )
        found = json.loads(result.read_text()) if result.exists() else None
        return status, found, capsys.readouterr().out

    return run


@pytest.fixture
def told(monkeypatch):
    """Every (ranks, command) that the parent sends."""
    sent = []
    tell = Fleet.tell

    def spy(self, ranks, command):
        sent.append((list(ranks), command))
        tell(self, ranks, command)

    monkeypatch.setattr(Fleet, "tell", spy)
    return sent


@pytest.mark.parametrize(
    ("tp_prefill", "tp_decode", "codec"),
    [(1, 1, "none"), (1, 2, "lz4"), (2, 1, "zstd"), (2, 2, "none")],
)
def test_tokens_equal_a_single_process(demo, told, tmp_path, tp_prefill, tp_decode, codec):
    status, result, output = demo(
        "--tp-prefill", tp_prefill, "--tp-decode", tp_decode, "--codec", codec
    )

    assert status == 0, output
    assert "Tokens equal" in output
    check_schema(result, tp_prefill, tp_decode, codec)
    assert all(len(r["tokens"]) == 32 for r in result["requests"])
    check_files(tmp_path / "out", result, tp_prefill + tp_decode)
    check_decode_never_saw_a_prompt(told, tp_prefill)
    check_transformers_agrees(result)


def check_schema(result, tp_prefill, tp_decode, codec):
    assert set(result) == {
        "schema", "tokens_equal", "requests", "backend", "overlap", "tp_prefill", "tp_decode",
        "codec", "transport", "files",
    }  # fmt: skip
    assert result["schema"] == "sagellm.demo/1"
    assert result["tokens_equal"] is True
    assert (result["tp_prefill"], result["tp_decode"]) == (tp_prefill, tp_decode)
    assert (result["codec"], result["transport"]) == (codec, "tcp")
    assert set(result["backend"]) == {"name", "algorithm", "reason"}
    assert result["backend"]["name"] == ("shm" if sys.platform == "linux" else "gloo")
    assert result["backend"]["reason"]
    assert set(result["overlap"]) == {"eff_trace", "eff_saved"}
    assert 0 < result["overlap"]["eff_trace"] <= 1
    assert isinstance(result["overlap"]["eff_saved"], float)
    for request in result["requests"]:
        assert set(request) == {
            "prompt_tokens", "tokens", "kv_bytes", "wire_bytes", "ratio", "bytes_per_s",
            "time_to_first_token_s", "tokens_per_s",
        }  # fmt: skip
        pages = -(-request["prompt_tokens"] // 16)
        assert request["kv_bytes"] == pages * 16 * 8 * 2 * 2 * 64 * 4  # layers, K and V, heads
        assert request["ratio"] == request["kv_bytes"] / request["wire_bytes"]
        assert (request["ratio"] > 1) == (codec == "zstd") or codec == "lz4"
        assert min(request["time_to_first_token_s"], request["tokens_per_s"]) > 0
        assert request["bytes_per_s"] > 0


def check_files(out, result, ranks):
    assert sorted(result["files"]) == sorted(str(p) for p in out.iterdir())
    for name in ("timeline.svg", "topology.svg"):
        root = ElementTree.parse(out / name).getroot()
        assert root.tag.endswith("svg")
        text = " ".join(root.itertext())
        assert all(f"rank {rank}" in text for rank in range(ranks))
    events = json.loads((out / "trace.json").read_text())["traceEvents"]
    spans = [e for e in events if e["ph"] == "X"]
    assert {e["pid"] for e in spans} == set(range(ranks))
    assert {e["cat"] for e in spans} == {"compute", "kv send", "kv receive"}
    assert all(e["ts"] >= 0 and e["dur"] >= 0 for e in spans)
    starts = {e["id"]: e for e in events if e["ph"] == "s"}
    ends = {e["id"]: e for e in events if e["ph"] == "f"}
    assert starts.keys() == ends.keys() != set()
    assert all(starts[i]["ts"] <= ends[i]["ts"] for i in starts)


def check_decode_never_saw_a_prompt(told, first_decode_rank):
    to_decode = [c for ranks, c in told if max(ranks) >= first_decode_rank]
    assert {type(c) for c in to_decode} == {Admit, Decode, Stop}
    assert set(Admit.__struct_fields__) == {"id", "num_tokens", "max_new_tokens", "discard"}
    assert set(Decode.__struct_fields__) == {"id", "first_token"}
    assert any(isinstance(c, Prefill) for _, c in told)


def check_transformers_agrees(result):
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32)
    prompts, _ = load_prompts(TINY_LLAMA, PROMPTS)
    for prompt, request in zip(prompts, result["requests"], strict=True):
        ids = torch.tensor([prompt.tokens + request["tokens"]])
        with torch.inference_mode():
            best = model(ids).logits[0].argmax(-1).tolist()
        first = request["prompt_tokens"] - 1
        assert best[first : first + len(request["tokens"])] == request["tokens"]


def test_its_own_prompts_are_several_and_some_are_pages_long():
    prompts, _ = load_prompts(TINY_LLAMA, [])

    lengths = [len(p.tokens) for p in prompts]
    assert len(set(lengths)) == len(lengths) >= 4
    assert sum(n > 1500 for n in lengths) >= 2
    assert max(lengths) + 32 <= 4096


def test_zeroing_a_layer_changes_the_tokens_and_the_exit_status(demo):
    status, result, output = demo("--sabotage-layer", 3, "--tp-prefill", 1)

    assert status == 1
    assert result["tokens_equal"] is False
    assert "Tokens differ" in output
    assert "layer 3 was zeroed" in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tp-prefill", "3"], ["tp_size=3", "use one of 1, 2, 4"]),
        (["--tp-decode", "0"], ["tp_size=0"]),
        (["--backend", "ncll"], ["ncll", "gloo", "nccl"]),
        (["--backend", "nccl"], ["nccl", "cuda", "CPU"]),
        (["--codec", "zip"], ["zip", "lz4", "none", "zstd"]),
        (["--transport", "pigeon"], ["pigeon", "tcp"]),
        (["--sabotage-layer", "8"], ["8", "0..7"]),
        (["--max-new-tokens", "0"], ["at least 1"]),
        (["--max-new-tokens", "5000"], ["4096"]),
        (["--prompt", ""], ["prompt 3 is empty"]),
        (["--checkpoint", "nowhere"], ["nowhere"]),
    ],
)
def test_bad_arguments_are_refused_before_a_process_starts(demo, told, arguments, words):
    status, result, output = demo(*arguments)

    assert status == 2
    assert result is None
    assert told == []
    assert all(word in output for word in words), output


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the demo's checkpoint that a test may damage."""
    return Path(shutil.copytree(TINY_LLAMA, tmp_path / "checkpoint"))


def test_a_missing_tensor_is_named(demo, told, checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.layers.5.mlp.down_proj.weight"]
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})

    status, _, output = demo("--checkpoint", checkpoint)

    assert status == 3
    assert "[integrity]" in output
    assert "model.layers.5.mlp.down_proj.weight" in output
    assert told == []


def test_a_truncated_file_is_named(demo, checkpoint):
    file = checkpoint / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)

    status, _, output = demo("--checkpoint", checkpoint)

    assert status == 3
    assert "[integrity]" in output
    assert "truncated" in output


def test_a_port_in_use_is_named(demo, told, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("SAGELLM_COMM_PORTS_FIXED__STORE", str(port))

        status, _, output = demo()

    assert status == 3
    assert "[resource_exhausted]" in output
    assert str(port) in output
    assert told == []


def test_a_peer_that_stops_answering_is_named_at_the_deadline():
    job = Job(str(TINY_LLAMA), tp_prefill=1, tp_decode=1, transfer_deadline_s=2.0)
    with Fleet(job) as fleet:
        router = Router(fleet, Progress(Console(quiet=True), 2, {}))
        router.wait_until_ready(DEADLINE_S)
        os.kill(router.ready[1].pid, signal.SIGSTOP)
        fleet.tell([0], Prefill("unheard", list(range(32))))

        with pytest.raises(RankLostError) as caught:
            listen_until_failure(fleet)

    assert caught.value.failed.keys() == {0}
    assert caught.value.failed[0].code in ("comm_timeout", "kv_transfer_failed")
    assert "did not reach rank 1" in caught.value.failed[0].message
    assert "rank 1 (decode) was still running and has been ended" in str(caught.value)


def listen_until_failure(fleet):
    while True:
        fleet.next(DEADLINE_S, "a failure")


@pytest.fixture
def serving():
    """A job of 2 x 2 ranks that is ready, its fleet and its router."""
    job = Job(str(TINY_LLAMA), tp_prefill=2, tp_decode=2, prefill_blocks=200, decode_blocks=200)
    with Fleet(job) as fleet:
        router = Router(fleet, Progress(Console(quiet=True), job.world_size, {}))
        router.wait_until_ready(DEADLINE_S)
        yield fleet, router


@pytest.mark.parametrize("victim", [1, 3])
def test_every_rank_learns_of_a_rank_killed_mid_transfer(serving, victim):
    fleet, router = serving
    prompts, _ = load_prompts(TINY_LLAMA, [])
    longest = max((p.tokens for p in prompts), key=len)
    fleet.tell([2, 3], Admit("doomed", len(longest), 8))
    fleet.tell([0, 1], Prefill("doomed", longest))
    heard, killed_s = [], []

    def listen():
        while True:
            heard.append(fleet.next(DEADLINE_S, "the rank to be missed").event)
            if not killed_s and isinstance(heard[-1], LayerSent):
                killed_s.append(time.monotonic())
                os.kill(router.ready[victim].pid, signal.SIGKILL)

    with pytest.raises(RankLostError) as caught:
        listen()

    failed = caught.value.failed
    survivors = {0, 1, 2, 3} - {victim}
    assert f"rank {victim} " in str(caught.value).splitlines()[0]
    assert "SIGKILL" in str(caught.value)
    assert all(isinstance(failed[rank], Failed) for rank in survivors), failed
    learnt_s = max(failed[rank].at_s for rank in survivors) - killed_s[0]
    assert learnt_s < LEARNS_WITHIN_S, failed
    assert {failed[rank].code for rank in survivors} <= {"peer_lost", "kv_transfer_failed"}, failed
    assert not any(isinstance(event, Token) for event in heard)


@linux
@pytest.mark.parametrize(
    ("moment", "number", "status"),
    [
        ("Topology", signal.SIGTERM, 130),
        ("Ranks", signal.SIGINT, 130),
        ("Ranks", signal.SIGKILL, -signal.SIGKILL),
    ],
)
def test_an_interrupt_leaves_no_process_port_or_segment(tmp_path, moment, number, status):
    (tmp_path / "model").symlink_to(TINY_LLAMA)
    segments = set(os.listdir("/dev/shm"))
    demo = subprocess.Popen(
        [sys.executable, DEMO, f"--checkpoint={tmp_path / 'model'}", f"--out={tmp_path / 'out'}"],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"COLUMNS": "160"},
        # a runner in the background ignores interrupts, and its children would inherit that
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    with demo:
        for line in demo.stdout:
            if line.startswith(moment):
                break
        ports = {p for pid in processes_of(tmp_path) for p in listening(pid)}

        demo.send_signal(number)

        output = demo.stdout.read()
        assert demo.wait(DEADLINE_S) == status, output
    # after SIGKILL nobody waits for the ranks, which end by themselves
    allowed_s = ORPHANS_END_WITHIN_S if number == signal.SIGKILL else 0.0
    assert comes_true(lambda: not processes_of(tmp_path), allowed_s)
    if moment == "Ranks":
        assert len(ports) >= 4, "the store's and a channel's per rank"
    assert all(comes_true(partial(refuses, port), allowed_s) for port in ports)
    assert set(os.listdir("/dev/shm")) <= segments


def comes_true(condition, within_s):
    end_s = time.monotonic() + within_s
    while not condition():
        if time.monotonic() >= end_s:
            return False
        os.sched_yield()
    return True


def refuses(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except (ConnectionRefusedError, ConnectionResetError):
        return True
    return False


def processes_of(marker):
    """Processes whose command line names the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(marker).encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def listening(pid):
    """TCP ports that a process listens on."""
    try:
        links = [os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()]
        table = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    except (FileNotFoundError, ProcessLookupError):
        return set()
    inodes = {m[1] for link in links if (m := re.fullmatch(r"socket:\[(\d+)\]", link))}
    rows = [row.split() for row in table]
    return {int(r[1].split(":")[1], 16) for r in rows if r[3] == "0A" and r[9] in inodes}
