"""The compiled engine under ThreadSanitizer, without vector variants, and as an aarch64 program.

The library as it is on this machine is held to the same results by `test_engine_results`.
"""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sagellm.comm.collective_ops._shm.build import FLAGS, SOURCE, compiler
from sagellm.comm.collective_ops._shm.native_library import ABI, library

HARNESS = Path(__file__).parent / "native" / "threads.c"
SHIPPED = [*(f for f in FLAGS if f != "-fPIC"), "-Wall", "-Werror", "-fstack-protector-all"]
LONGEST_S = 280  # on a machine that does a dozen other things; alone each takes seconds

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="shm needs Linux"),
    pytest.mark.timeout(300),
]


def build(command, program, *flags):
    """The harness and the engine as one program, which is the answer."""
    sources = ["-I", str(SOURCE.parent), "-o", str(program), str(HARNESS), "-pthread", "-lm"]
    done = subprocess.run(
        [*command, *SHIPPED, *flags, *sources], capture_output=True, text=True, timeout=LONGEST_S
    )
    assert done.returncode == 0, done.stderr
    return program


def run(command, *arguments):
    return subprocess.run(
        [*map(str, (*command, *arguments))], capture_output=True, text=True, timeout=LONGEST_S
    )


def agrees(command):
    """Whether all types and reductions do on the machine of a program."""
    done = run(command, "folds")

    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout.split()[0]) > 190_000


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
    flags = ["-DSAGE_PORTABLE", "-g", "-O1", "-fno-tree-vectorize", *tool]
    return [*prefix, build(command, folder / "threads", *flags)]


@pytest.mark.parametrize("world", [2, 3])
def test_no_data_race_in_mixed_calls(sanitized, world):
    done = run(sanitized, world, 300)

    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == f"300 rounds of {world} ranks\n"


def test_every_type_and_reduction_without_vector_variants(sanitized):
    agrees(sanitized)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    compile_for_it = shutil.which("aarch64-linux-gnu-gcc")
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if compile_for_it is None or emulator is None:
        pytest.skip("no aarch64 compiler and emulator")
    program = tmp_path_factory.mktemp("aarch64") / "threads"
    return [emulator, build([compile_for_it], program, "-static")]


@pytest.mark.parametrize("world", [2, 3])
def test_aarch64_gives_the_same_results(emulated, world):
    done = run(emulated, world, 100)

    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == f"100 rounds of {world} ranks\n"


def test_every_type_and_reduction_on_aarch64(emulated):
    agrees(emulated)


def test_a_library_for_aarch64_is_left_out(tmp_path):
    command = shutil.which("aarch64-linux-gnu-gcc")
    if command is None or platform.machine() == "aarch64":
        pytest.skip("no compiler for another machine")
    source = tmp_path / "other.c"
    source.write_text(f"int sage_shm_abi(void) {{ return {ABI}; }}\n")
    target = tmp_path / "_sage_shm.so"
    subprocess.run(
        [command, "-shared", "-fPIC", "-o", str(target), str(source)], check=True, timeout=LONGEST_S
    )

    reason = library(target)

    assert isinstance(reason, str)
    assert str(target) in reason
