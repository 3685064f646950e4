"""The compiled engine under ThreadSanitizer, and as an aarch64 program."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sagellm.comm.collective_ops._shm.build import FLAGS, SOURCE, compiler

HARNESS = Path(__file__).parent / "native" / "threads.c"
COMMON = [*(f for f in FLAGS if f not in ("-O3", "-fPIC")), "-g", "-O1", "-Wall", "-Werror"]
LONGEST_S = 60  # on a machine that does a dozen other things; alone each takes under a second

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the shm backend needs Linux"
)


def build(command, program, *flags):
    """The harness and the engine as one program."""
    done = subprocess.run(
        [*command, *COMMON, *flags, "-I", str(SOURCE.parent), "-o", str(program), str(HARNESS)],
        capture_output=True, text=True, timeout=LONGEST_S,
    )  # fmt: skip
    return done


def run(command, world, rounds):
    return subprocess.run(
        [*map(str, command), str(world), str(rounds)],
        capture_output=True, text=True, timeout=LONGEST_S,
    )  # fmt: skip


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    command = compiler()
    if command is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("tsan")
    probe = folder / "probe.c"
    probe.write_text("int main(void) { return 0; }\n")
    tool = ["-fsanitize=thread", "-pthread"]
    linked = subprocess.run(
        [*command, *tool, "-o", str(folder / "probe"), str(probe)],
        capture_output=True, timeout=LONGEST_S,
    )  # fmt: skip
    if linked.returncode:
        pytest.skip("this compiler has no ThreadSanitizer")
    prefix = []
    if subprocess.run([folder / "probe"], capture_output=True, timeout=LONGEST_S).returncode:
        prefix = ["setarch", "--addr-no-randomize"]  # more random bits than its shadow has room for
        try:
            subprocess.run([*prefix, folder / "probe"], check=True, timeout=LONGEST_S)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("ThreadSanitizer does not run here")
    program = folder / "threads"
    done = build(command, program, "-DSAGE_PORTABLE", *tool)
    assert done.returncode == 0, done.stderr
    return [*prefix, program]


@pytest.mark.parametrize("world", [2, 3])
def test_no_data_race_in_mixed_calls(sanitized, world):
    done = run(sanitized, world, 300)

    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == f"300 rounds of {world} ranks\n"


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    compile_for_it = shutil.which("aarch64-linux-gnu-gcc")
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if compile_for_it is None or emulator is None:
        pytest.skip("no aarch64 compiler and emulator")
    program = tmp_path_factory.mktemp("aarch64") / "threads"
    done = build([compile_for_it], program, "-static", "-pthread")
    assert done.returncode == 0, done.stderr
    return [emulator, program]


@pytest.mark.parametrize("world", [2, 3])
def test_aarch64_gives_the_same_results(emulated, world):
    done = run(emulated, world, 100)

    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == f"100 rounds of {world} ranks\n"
