"""`python -m sagellm.core.protocols.testing`: exit codes, reports and refusals."""

import json
import subprocess
import sys
import threading
import zlib

import pytest

from sagellm.core.protocols import IntegrityError
from sagellm.core.protocols.errors import BackendUnavailableError, ConfigError
from sagellm.core.protocols.testing import CONTRACT_VERSION, Report, check_codec
from sagellm.core.protocols.testing.__main__ import main
from sagellm.core.protocols.testing.contract import Check, Entry, Refused, run_local
from sagellm.core.protocols.testing.targets import BackendTarget, factory_of, resolve

MODULE = """
import zlib
from sagellm.core.protocols import (
    BackendSpec, Capabilities, IntegrityError, KVCodec, Probe, TopologyFragment
)

class Plain(KVCodec):
    def encode(self, block, *, dtype):
        return bytes(block)
    def decode(self, frame, out, *, dtype):
        if len(frame) != len(out):
            raise IntegrityError("size")
        out[:] = frame

class Broken(Plain):
    def decode(self, frame, out, *, dtype):
        out[:] = bytes(len(out))

ABSENT = BackendSpec(
    "absent", ("cpu",), "gloo", 1, Capabilities(), lambda: Probe(False, "no device"), lambda: None
)

class Nothing:
    def detect(self, ctx):
        return TopologyFragment("nothing")
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "kit_example_of_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "kit_example_of_test"
    sys.modules.pop("kit_example_of_test", None)


def test_a_report_is_written_and_success_is_zero(module, tmp_path, capsys):
    file = tmp_path / "report.json"

    code = main(
        ["--codec", f"{module}:Plain", "--detector", f"{module}:Nothing", "--json", str(file)]
    )

    codec, detector = json.loads(file.read_text())
    assert code == 0
    assert codec["schema"] == "sagellm.conformance/1"
    assert codec["contract_version"] == CONTRACT_VERSION
    assert codec["counts"]["skipped"] == 1
    assert codec["counts"]["failed"] == 0
    assert detector["kind"] == "detector"
    assert "0 failed" in capsys.readouterr().out


def test_a_skip_fails_a_reference_implementation(module, capsys):
    assert main(["--codec", f"{module}:Plain", "--reference"]) == 1


def test_a_failure_is_one_and_named(module, capsys):
    assert main(["--codec", f"{module}:Broken", "--only", "what goes in*"]) == 1
    assert "failed   what goes in comes out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["--codec", "no_such_module_here:X"], "no_such_module_here"),
        (["--codec", "json:Nothing"], "has no 'Nothing'"),
        (["--codec", "json:__all__"], "neither a spec nor"),
        (["--transport", "pigeon"], "has no 'pigeon'"),
        (["--overlap-manager", "none-such"], "is not module:attribute"),
        (["--backend", "none-such"], "has no 'none-such'"),
        (["--codec", "zlib:compress", "--only", "x"], "no check matches"),
    ],
)
def test_what_cannot_be_tried_is_two(argv, match, capsys):
    assert main(argv) == 2
    assert match in capsys.readouterr().err


def test_a_backend_without_its_device_is_two_and_starts_no_rank(module, capsys):
    assert main(["--backend", f"{module}:ABSENT"]) == 2

    said = capsys.readouterr()
    assert said.err == "absent: no device\n"
    assert said.out == ""


@pytest.mark.parametrize("argv", [[], ["--world-size", "0", "--codec", "x"]])
def test_bad_arguments_end_with_usage(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2


def test_the_command_runs_as_a_module(module):
    done = subprocess.run(
        [sys.executable, "-m", "sagellm.core.protocols.testing", "--help"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip

    assert done.returncode == 0
    assert "--overlap-manager" in done.stdout
    assert done.stderr == ""


def test_a_module_that_fails_to_import_is_unavailable(tmp_path, monkeypatch):
    (tmp_path / "kit_broken_of_test.py").write_text("from json import nothing_of_that_name")
    monkeypatch.syspath_prepend(str(tmp_path))

    with pytest.raises(BackendUnavailableError, match="cannot be imported"):
        resolve("codec", "kit_broken_of_test:X")


def test_an_object_stands_for_itself():
    assert resolve("codec", zlib) is zlib
    assert factory_of(zlib.compress) is zlib.compress
    with pytest.raises(ConfigError):
        factory_of(3)


def test_a_target_that_is_no_world_is_for_processes():
    assert not BackendTarget(zlib.compress).in_process()


def test_a_check_that_hangs_fails_and_the_next_one_runs():
    checks = [
        Check("hangs", lambda argument: threading.Event().wait(30), timeout_s=0.2),
        Check("runs", lambda argument: None),
        Check("refuses", lambda argument: refuse()),
    ]

    report = run_local("codec", "toy", checks, None)

    assert [e.status for e in report.entries] == ["failed", "run", "refused"]
    assert "still running" in report.entries[0].detail


def refuse():
    raise Refused("no")


def test_a_report_in_words():
    report = Report("codec", "toy", [Entry("a", "run"), Entry("b", "skipped", "why")], 2)

    assert report.text().splitlines() == [
        "skipped  b: why",
        f"codec toy on 2 ranks, contract {CONTRACT_VERSION}: 1 run, 0 refused, 1 skipped, 0 failed",
    ]


def test_integrity_is_part_of_the_codec_contract():
    assert issubclass(IntegrityError, OSError)
    assert check_codec.__doc__
