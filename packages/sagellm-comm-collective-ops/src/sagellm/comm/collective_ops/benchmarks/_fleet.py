"""The ranks of every contender, started once per launch and asked in turn.

Each contender has processes of its own, because two MPIs cannot live in one. They stay for the
whole launch, so that cases share their start; who is not asked is blocked in a read.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.metadata
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from io import BufferedRWPair
from pathlib import Path
from typing import Any

from sagellm.core.protocols import DistributedRuntimeError

from . import _deepspeed
from ._barrier import LINE_BYTES

START_S = 120.0
ANSWER_S = 180.0
END_S = 5.0
_PREFIX = "sagellm-bench-"

build_peers = True
"""Whether a contender that must be compiled first may be; `--quick` only takes what is there."""


class Ranks:
    """The processes of one contender over one world."""

    def __init__(self, kind: str, world: int) -> None:
        self._name = f"{kind} over {world} ranks"
        self.missing = ""
        self._world = world
        memory = Path("/dev/shm")
        base = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
        self._folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=base))
        for name in ("barrier", "handover"):
            (self._folder / name).write_bytes(bytes(world * LINE_BYTES))
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._folder / "socket"))
        self._listener.listen(world)
        self._wires: list[socket.socket] = []
        self._streams: dict[int, BufferedRWPair] = {}
        self._processes = [
            subprocess.Popen(
                command, env=environ, stdin=subprocess.DEVNULL, stdout=2, start_new_session=True
            )
            for command, environ in _commands(kind, world, self._folder)
        ]

    def ready(self) -> None:
        """Wait until every rank stands, or has said why it cannot: see `missing`.

        Raises:
            DistributedRuntimeError: One did not.

        """
        deadline = time.monotonic() + START_S
        while len(self._wires) < self._world:
            self._listener.settimeout(0.2)
            try:
                self._wires.append(self._listener.accept()[0])
            except TimeoutError:
                ended = [p.returncode for p in self._processes if p.poll()]
                if ended or time.monotonic() > deadline:
                    raise DistributedRuntimeError(
                        f"{self._name}: {len(self._wires)} ranks came in {START_S:g} s; "
                        f"exit codes {ended}"
                    ) from None
        if not self._streams:
            for wire in self._wires:
                wire.settimeout(START_S)
                stream = wire.makefile("rwb")
                said = self._read(stream, "its start")
                self._streams[said["rank"]] = stream
                self.missing = self.missing or said.get("missing", "")

    def ask(self, do: str, **arguments: object) -> list[Any]:  # Any: JSON
        """Have every rank do something at once; the answers by rank.

        Raises:
            DistributedRuntimeError: A rank failed, or did not answer in time.

        """
        self.ready()
        for wire in self._wires:
            wire.settimeout(ANSWER_S)
        request = json.dumps({"do": do, **arguments}).encode() + b"\n"
        streams = [self._streams[rank] for rank in sorted(self._streams)]
        for stream in streams:
            stream.write(request)
            stream.flush()
        return [self._read(stream, do)["answer"] for stream in streams]

    def _read(self, stream: BufferedRWPair, what: str) -> dict[str, Any]:
        try:
            line = stream.readline()
        except TimeoutError:
            line = b""
        if not line:
            raise DistributedRuntimeError(f"{self._name}: a rank did not answer to {what}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise DistributedRuntimeError(f"{self._name}, {what}:\n{answer['error']}")
        return answer

    def close(self) -> None:
        """End the processes: by asking, then by force."""
        for stream in self._streams.values():
            with contextlib.suppress(OSError):
                stream.write(b'{"do": "quit"}\n')
                stream.flush()
        deadline = time.monotonic() + END_S
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                if self._streams:
                    process.wait(max(0.0, deadline - time.monotonic()))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for wire in self._wires:
            wire.close()
        self._listener.close()
        _remove(self._folder)


def _remove(folder: Path) -> None:
    for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{folder.name}_*"):
        left.unlink(missing_ok=True)  # DeepSpeed unlinks its segments in no case
    shutil.rmtree(folder, ignore_errors=True)


def _sweep() -> None:
    """Remove what launches left that were killed, and could not do so themselves."""
    for folder in Path("/dev/shm").glob(f"{_PREFIX}*-*"):
        pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
        with contextlib.suppress(FileNotFoundError):
            mine = folder.stat().st_uid == os.getuid()
            if mine and pid.isdigit() and not Path("/proc", pid).exists():
                _remove(folder)


_fleet: dict[tuple[str, int], Ranks] = {}


def ranks_of(kind: str, world: int) -> Ranks:
    """The contender's ranks, started if they do not stand yet."""
    if not _fleet:
        atexit.register(close_all)
        _sweep()
    if (kind, world) not in _fleet:
        _fleet[kind, world] = Ranks(kind, world)
    return _fleet[kind, world]


def close_all(*, kind: str | None = None, world: int | None = None) -> None:
    """End all ranks, or those of one kind, or of worlds of one size."""
    for key in list(_fleet):
        if kind in (None, key[0]) and world in (None, key[1]):
            _fleet.pop(key).close()


def missing(kind: str) -> str:
    """Why a contender cannot run here; empty if it can."""
    if kind in ("mpich", "openmpi"):
        try:
            importlib.metadata.version("mpi4py")
            return "" if _launcher(kind) else f"the {kind} package has no launcher"
        except importlib.metadata.PackageNotFoundError as e:
            return f"{e.name} is not installed"
    if kind == "deepspeed":
        return _deepspeed.missing(build=build_peers)
    return ""


def _launcher(kind: str) -> Path | None:
    # both packages have a `mpiexec`: the one installed last has overwritten the other's
    name = {"mpich": "mpiexec.hydra", "openmpi": "prterun"}[kind]
    files = importlib.metadata.files(kind) or []
    return next((Path(str(f.locate())).resolve() for f in files if f.name == name), None)


def _commands(kind: str, world: int, folder: Path) -> Sequence[tuple[list[str], dict[str, str]]]:
    """What to start for all ranks to stand, with its environment."""
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    package = __name__.rpartition(".")[0]
    rank = [sys.executable, "-m", f"{package}._rank", kind, str(world), str(folder)]
    if kind not in ("mpich", "openmpi"):
        return [([*rank, str(r)], environ) for r in range(world)]

    launcher = _launcher(kind)
    assert launcher is not None
    prefix = str(launcher.parent.parent)
    environ |= {"MPI4PY_MPIABI": kind, "LD_LIBRARY_PATH": f"{prefix}/lib"}
    if kind == "mpich":
        return [([str(launcher), "-n", str(world), *rank], environ)]
    environ |= dict.fromkeys(("OPAL_PREFIX", "PRTE_PREFIX", "PMIX_PREFIX"), prefix)
    for name in ("OMPI", "PRTE"):
        environ |= {f"{name}_ALLOW_RUN_AS_ROOT": "1", f"{name}_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    chosen = ["--personality", "ompi", "--bind-to", "none", "--map-by", ":oversubscribe"]
    return [([str(launcher), *chosen, "-n", str(world), *rank], environ)]
