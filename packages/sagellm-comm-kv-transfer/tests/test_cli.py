"""The command line, mostly as processes: what it moves, prints, refuses and leaves behind."""

import io
import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch

from sagellm.comm.kv_transfer import KVTransferChannel
from sagellm.comm.kv_transfer._cli.live import Live
from sagellm.comm.kv_transfer._cli.main import main
from sagellm.comm.kv_transfer._cli.node import FilePart
from sagellm.comm.kv_transfer._cli.serve import Folder
from sagellm.core.protocols import ConfigError, ResourceError, TransferKey, TransferMetrics

COMMAND = [sys.executable, "-m", "sagellm.comm.kv_transfer"]


@pytest.fixture(autouse=True)
def no_configuration(monkeypatch):
    for name in [n for n in os.environ if n.startswith("SAGELLM_COMM_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "key"
    path.write_bytes(b"a key that both sides have")
    path.chmod(0o600)
    return str(path)


@pytest.fixture
def started():
    made = []

    def start(*arguments):
        child = subprocess.Popen(
            [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        made.append(child)
        return child

    yield start
    for child in made:
        if child.poll() is None:
            child.kill()
        child.communicate()


@pytest.fixture
def run(capsys):
    """Runs a command here, because a process would take seconds to import torch."""

    def call(*arguments):
        code = main(arguments)
        return code, *capsys.readouterr()

    return call


def read_documents(text):
    decoder, documents, at = json.JSONDecoder(), [], 0
    while at < len(text.rstrip()):
        document, at = decoder.raw_decode(text, at)
        documents.append(document)
        at += len(text[at:]) - len(text[at:].lstrip())
    return documents


def address_of(server):
    lines = ""
    while True:
        lines += server.stdout.readline()
        try:
            return json.loads(lines)["address"]
        except json.JSONDecodeError:
            assert server.poll() is None, server.stderr.read()


def test_a_file_arrives_whole_and_both_ends_say_what_it_took(tmp_path, key_file, started, run):
    source, folder = tmp_path / "big.bin", tmp_path / "out"
    source.write_bytes(os.urandom(20_000_001))
    folder.mkdir()
    server = started(
        "serve", "--json", "--key-file", key_file, "--output", str(folder), "--transfers", "3",
        "--pool-blocks", "64", "--block-bytes", "16k",
    )  # fmt: skip
    address = address_of(server)
    pool = ("--into-pool", "--blocks", "48", "--block-bytes", "16k")
    code, out, err = run("send", address, "--json", "--key-file", key_file, *pool)
    assert (code, err, json.loads(out)["bytes"]) == (0, "", 48 << 14)

    code, out, err = run("send", address, "--json", "--key-file", key_file, "--file", str(source))
    served, complaints = server.communicate(timeout=60)

    assert (code, err) == (0, "")
    sent = json.loads(out)
    (received,) = read_documents(served)
    assert (server.returncode, complaints) == (0, "")
    assert (folder / "big.bin").read_bytes() == source.read_bytes()
    assert os.listdir(folder) == ["big.bin"]
    for report, nbytes, transfers in (
        (sent, 20_000_001, 2), (received, 20_000_001 + (48 << 14), 3),
    ):  # fmt: skip
        assert report["bytes"] == nbytes
        assert report["wire_bytes"] > 0
        assert (report["transfers"], report["retries"], report["failures"]) == (transfers, 0, {})
        assert report["bytes_per_s"] > 0
        assert report["path"].partition(":")[0] in ("tcp", "shm")
    assert sent["error"] is None


def test_an_interrupt_ends_both_and_leaves_nothing_behind(tmp_path, key_file, started):
    folder = tmp_path / "out"
    folder.mkdir()
    server = started("serve", "--json", "--key-file", key_file, "--output", str(folder))
    address = address_of(server)
    with KVTransferChannel(node_id=5, peers={0: address}, key_file=key_file) as channel:
        part = FilePart("run", 0, 1 << 20, "half.bin")
        channel.transfer([torch.zeros(1 << 19, dtype=torch.uint8)], 0, key=part.key()).wait(20)
        first = channel.inspect(0)
        assert first["stats"]["transfers"] == {"landed": 1}

        sender = started("send", address, "--key-file", key_file, "--blocks", "100000000")
        while len(channel.inspect(0)["links"]) < 2:
            assert sender.poll() is None, sender.stderr.read()
        sender.send_signal(signal.SIGINT)
        assert sender.wait(40) == 130

    server.send_signal(signal.SIGTERM)
    out, err = server.communicate(timeout=40)
    assert (server.returncode, err) == (130, "")
    assert read_documents(out)[-1]["transfers"] >= 1
    assert os.listdir(folder) == []
    host, port = address.rsplit(":", 1)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), 5)


def test_probe_and_doctor_tell_what_a_node_has(key_file, channel, layout, tensors, capsys):
    node = channel(node_id=3, peers={}, key_file=key_file)
    node.register(layout(), tensors(layout()))
    node.receive(TransferKey("awaited"), [4, 2], source_node=9)
    takers = [node.receive(None), node.receive(None)]

    assert main(["probe", node.address, "--peer", "3", "--key-file", key_file, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["doctor", "--address", node.address, "--peer", "3", "--key-file", key_file]) == 0
    text = capsys.readouterr().out

    assert [t.wait(10).done() for t in takers] == [True, True]
    assert found["protocol_version"] >= 1
    assert found["path"].partition(":")[0] in ("tcp", "shm")
    assert "layer0" in found["layout"]
    assert 0 < found["round_trip_s"] < 10
    assert found["bytes_per_s"] > 0
    assert "awaited/0" in text
    assert "node 9" in text
    assert "in use, 2 of kv: 4, 2" in text


def test_a_wrong_key_learns_nothing(tmp_path, key_file, channel, capsys):
    node = channel(node_id=0, peers={}, key_file=key_file)
    other = tmp_path / "other"
    other.write_bytes(b"some other key entirely")
    other.chmod(0o600)

    code = main(["doctor", "--address", node.address, "--key-file", str(other)])

    out, err = capsys.readouterr()
    assert (code, out) == (1, "")
    assert "key" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["send", "127.0.0.1:1"], "a key is needed"),
        (["send", "nowhere", "--key-file", "KEY"], "'nowhere' is not host:port"),
        (["send", "127.0.0.1:1", "--key-file", "/nosuch"], "/nosuch"),
        (["send", "127.0.0.1:1", "--key-file", "KEY", "--file", "/nosuch"], "--file /nosuch"),
        (["send", "127.0.0.1:1", "--key-file", "KEY", "--blocks", "0"], "--blocks 0"),
        (["send", "127.0.0.1:1", "--key-file", "KEY", "--node", "0"], "both 0"),
        (["serve", "--key-file", "KEY", "--listen", "here"], "'here' is not host:port"),
        (["serve", "--key-file", "KEY", "--output", "/nosuch"], "--output /nosuch"),
        (["serve", "--key-file", "KEY", "--transfers", "0"], "--transfers 0"),
        (["serve", "--key-file", "KEY", "--transport", "pigeon"], "pigeon"),
    ],
)
def test_bad_arguments_are_named_and_end_in_2(arguments, says, key_file, capsys):
    code = main([key_file if a == "KEY" else a for a in arguments])

    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert says in err


def test_nobody_there_is_a_failure_with_a_reason(key_file, run):
    code, out, err = run(
        "probe", "127.0.0.1:1", "--key-file", key_file, "--timeout-s", "0.3", "--json"
    )

    assert (code, out) == (1, "")
    assert "refused" in err


def test_doctor_looks_at_what_channels_need(capsys):
    assert main(["doctor", "--json"]) == 0

    found = {f["name"]: f for f in json.loads(capsys.readouterr().out)}
    assert {
        "ports", "socket buffers", "locked memory", "process_vm_readv", "open files", "memfd",
        "/dev/shm", "unix sockets", "transport tcp",
    } <= found.keys()  # fmt: skip
    assert found["ports"]["status"] == "ok"


def test_bench_hands_its_arguments_on(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "cpu", "--launches", "0"])

    assert ended.value.code == 2
    assert "--launches 0 is not positive" in capsys.readouterr().err


def test_a_terminal_shows_bytes_path_and_retries_on_the_way(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "120")
    with Live("send", 4 << 20) as live:
        live.landed(TransferMetrics(bytes=1 << 20, retries=3, path="tcp:2"))
        live.show(1 << 20)
        live.failed("peer_lost")

    assert "2.0/4.0 MiB" in screen.getvalue()
    assert "tcp:2" in screen.getvalue()
    assert "3 retries" in screen.getvalue()
    assert live.line().endswith("1 transfers over tcp:2, 3 retries, 1 failed (peer_lost)")


@pytest.mark.parametrize(
    "name", ["../up", "/etc/passwd", "a/b", "..", ".", "", "nul\0", "x" * 300], ids=repr
)
def test_a_peer_cannot_name_a_file_elsewhere(name):
    assert FilePart.of(TransferKey(f"file/run/0/10/{name}")) is None
    with pytest.raises(ConfigError):
        FilePart("run", 0, 10, name).key()


@pytest.mark.parametrize(
    "text", ["file/r.n/0/1/x", "file/run/-1/1/x", "file/run/0/1e3/x", "file/run/0/x", "other"]
)
def test_a_key_that_is_of_no_file_is_none(text):
    assert FilePart.of(TransferKey(text)) is None


def test_parts_of_a_file_stay_within_what_was_announced(tmp_path):
    with Folder(str(tmp_path), max_file_bytes=8) as folder:
        folder.write(FilePart("a", 4, 8, "x"), [b"5678"])
        folder.write(FilePart("a", 4, 8, "x"), [b"????"])  # once more: it does not count twice
        for part, data in (
            (FilePart("a", 6, 8, "x"), b"789"),
            (FilePart("b", 0, 9, "y"), b"1"),
        ):
            with pytest.raises(ResourceError, match="at most 8 B are stored"):
                folder.write(part, [data])
        folder.write(FilePart("c", 0, 8, "z"), [b"1234"])
        assert not (tmp_path / "x").exists()
        folder.write(FilePart("a", 0, 8, "x"), [b"1234"])

    assert (tmp_path / "x").read_bytes() == b"12345678"
    assert os.listdir(tmp_path) == ["x"]
