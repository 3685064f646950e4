"""Compile the C engine: `python -m sagellm.comm.collective_ops._shm.build`, and the wheel's hook.

Nothing but the standard library is imported here: the hook loads this file by itself.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

__all__ = [
    "FLAGS",
    "PORTABLE",
    "SOURCE",
    "TARGET",
    "compile_library",
    "compiler",
    "is_current",
    "mark_current",
]

SOURCE = Path(__file__).with_name("_native.c")
TARGET = Path(__file__).with_name("_sage_shm.so")
FLAGS = (
    *(
        "-std=gnu11",
        "-O2",
        "-ftree-vectorize",
        "-fvect-cost-model=dynamic",
        "-fPIC",
        "-fvisibility=hidden",
    ),
    *("-ffp-contract=off", "-fno-trapping-math"),
)
"""No contraction: sums must have the same bits on every machine."""
PORTABLE = ("-DSAGE_PORTABLE",)
"""For a compiler or C library without function variants per processor (`target_clones`)."""


def compiler() -> list[str] | None:
    """The command of a C compiler: $CC, cc, gcc or clang; None if there is none."""
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        command = shlex.split(name)
        if command and shutil.which(command[0]):
            return command
    return None


def compile_library(target: Path = TARGET) -> str | None:
    """Make the library; None when it is there, else why not. An older one is replaced at once."""
    if not sys.platform.startswith("linux"):
        return f"the shm backend needs Linux, this is {sys.platform}"
    command = compiler()
    if command is None:
        return "no C compiler: set CC, or install gcc or clang"
    made = target.with_name(f"{target.name}.{os.getpid()}")
    wrong: str | None = None
    try:
        for variant in ((), PORTABLE):
            done = subprocess.run(
                [*command, *FLAGS, *variant, "-shared", "-o", str(made), str(SOURCE)],
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
            if not done.returncode:
                made.replace(target)
                return None
            wrong = f"{shlex.join(command)} failed: {done.stderr.strip()[-2000:]}"
    except (OSError, subprocess.TimeoutExpired) as e:
        wrong = f"{shlex.join(command)} could not run: {e}"
    finally:
        made.unlink(missing_ok=True)
    return wrong


def _digest(target: Path) -> str:
    """What the library was made of and by, and the library itself."""
    found = hashlib.sha256(repr((compiler(), FLAGS, platform.machine())).encode())
    for file in (*sorted(SOURCE.parent.glob("_native*.[ch]")), target):
        found.update(hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()


def _mark(target: Path) -> Path:
    return target.with_name(f"{target.name}.made")


def is_current(target: Path = TARGET) -> bool:
    """Whether the library is the one that `mark_current` saw, and nothing it is made of changed."""
    try:
        return _mark(target).read_text() == _digest(target)
    except OSError:
        return False


def mark_current(target: Path = TARGET) -> None:
    """Note that the library was made of the sources as they are: to compile takes 15 s."""
    _mark(target).write_text(_digest(target))


if __name__ == "__main__":
    wrong = compile_library()
    print(f"not built: {wrong}" if wrong else f"built {TARGET}")
    raise SystemExit(1 if wrong else 0)
