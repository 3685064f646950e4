"""DeepSpeed's shared-memory all_reduce: two C++ files of its package, compiled once and kept.

`python -m …_deepspeed` compiles them; so does a run of a benchmark without `--quick`.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from types import ModuleType

NAME = "deepspeed_shm_comm"
COMPILE_S = 600.0


def library() -> Path:
    """Where the compiled file is kept, whether or not it exists.

    Raises:
        importlib.metadata.PackageNotFoundError: DeepSpeed or torch is not installed.

    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parts = (
        f"deepspeed-{metadata.version('deepspeed')}",
        f"torch-{metadata.version('torch')}",
        sys.implementation.cache_tag or "python",
        platform.machine(),
    )
    return cache / "sagellm" / "benchmarks" / "-".join(parts) / f"{NAME}.so"


def missing(*, build: bool) -> str:
    """Why DeepSpeed cannot run here; empty if it can. With `build`, compile it if need be."""
    try:
        file = library()
    except metadata.PackageNotFoundError as e:
        return f"{e.name} is not installed"
    if file.is_file():
        return ""
    if not build:
        return "not compiled yet; a run without --quick does so"
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__],
            capture_output=True, text=True, timeout=COMPILE_S, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"it did not compile in {COMPILE_S:g} s"
    if done.returncode or not file.is_file():
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return f"it does not compile here: {last}"
    return ""


def compile_library() -> Path:
    """Compile into a folder of this process, then move the result to its place at once."""
    file = library()
    if file.is_file():
        return file
    spec = importlib.util.find_spec("deepspeed")
    places = list(spec.submodule_search_locations or ()) if spec else []
    if not places:
        raise FileNotFoundError("the deepspeed package has no folder")
    source = Path(places[0]) / "ops" / "csrc" / "cpu"
    from torch.utils import cpp_extension

    # ninja's program lies beside this Python, which need not be on PATH
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        cpp_extension.load(
            NAME,
            [str(source / "comm" / name) for name in ("shm_interface.cpp", "shm.cpp")],
            extra_cflags=["-O2", "-fopenmp"],
            extra_include_paths=[str(source / "includes")],
            build_directory=folder,
        )
        os.replace(Path(folder) / f"{NAME}.so", file)
    return file


def load() -> ModuleType:
    """The compiled module, which also registers `torch.ops.deepspeed`."""
    file = str(library())
    loader = importlib.machinery.ExtensionFileLoader(NAME, file)
    spec = importlib.util.spec_from_file_location(NAME, file, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


if __name__ == "__main__":
    print(compile_library())
