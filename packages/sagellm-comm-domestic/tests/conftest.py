"""Pools of rank processes, one per emulated vendor, and processes of their own for one question."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

_HERE = Path(__file__).parent
_DEADLINE_S = 90


class RankPool:
    """Two processes that live as long as the tests, each a rank of one world."""

    def __init__(self, vendor: str, size: int = 2) -> None:
        from torch.distributed import TCPStore

        # The kernel chooses the port; ranks join this store as they join torchrun's.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._ranks = [self._start(vendor, rank, size) for rank in range(size)]
        self._answers = [self._listen(rank) for rank in self._ranks]
        for answers in self._answers:
            assert answers.get(timeout=_DEADLINE_S) == "ready\n", "a rank did not start"

    def _start(self, vendor: str, rank: int, size: int) -> subprocess.Popen[str]:
        env = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        command = [sys.executable, str(_HERE / "rank_worker.py"), vendor]
        return subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    @staticmethod
    def _listen(rank: subprocess.Popen[str]) -> "queue.Queue[str]":
        lines: queue.Queue[str] = queue.Queue()

        def pump() -> None:
            assert rank.stdout is not None
            for line in rank.stdout:
                lines.put(line)
            lines.put("")

        threading.Thread(target=pump, daemon=True).start()
        return lines

    def run(self, scenario: str, **arguments: object) -> list:
        """Every rank's result; the failure of one is the failure of the test."""
        answers = self.ask(scenario, **arguments)
        for rank, answer in enumerate(answers):
            assert answer is not None, f"rank {rank} is gone"
            assert "error" not in answer, f"rank {rank}: {answer['trace']}"
        return [answer["result"] for answer in answers]

    def ask(self, scenario: str, **arguments: object) -> list:
        """Every rank's answer, None where the rank ended instead."""
        for rank in self._ranks:
            assert rank.stdin is not None
            rank.stdin.write(json.dumps([scenario, arguments]) + "\n")
            rank.stdin.flush()
        lines = [answers.get(timeout=_DEADLINE_S) for answers in self._answers]
        return [json.loads(line) if line else None for line in lines]

    def close(self) -> None:
        for rank in self._ranks:
            with contextlib.suppress(BrokenPipeError):
                rank.stdin.close()
        for rank in self._ranks:
            try:
                rank.wait(20)
            except subprocess.TimeoutExpired:
                rank.kill()
                rank.wait(20)
            rank.stdout.close()
        self._store = None


@pytest.fixture(scope="session")
def emulation() -> None:
    """Skips where this torch lacks the private interface that emulation stands on."""
    from sagellm.comm.domestic import can_emulate

    if not can_emulate():
        import torch

        pytest.skip(f"torch {torch.__version__} has no Python interface for emulated devices")


@pytest.fixture(scope="session")
def pools():
    """Makes pools by vendor; `cpu` is one without an emulated device."""
    made: dict[str, RankPool] = {}

    def pool(vendor: str) -> RankPool:
        if vendor not in made:
            made[vendor] = RankPool(vendor)
        return made[vendor]

    yield pool
    for open_pool in made.values():
        open_pool.close()


@pytest.fixture
def own_pool():
    """Makes a pool of this test's own, for tests that break it."""
    made: list[RankPool] = []

    def pool(vendor: str) -> RankPool:
        made.append(RankPool(vendor))
        return made[-1]

    yield pool
    for open_pool in made:
        open_pool.close()


@pytest.fixture
def python(tmp_path):
    """Runs a program in a process of its own and returns what it printed as JSON."""

    def run(source: str, *, path: Path | None = None, **env: str) -> object:
        prefix = "import json\ndef answer(x): print('@' + json.dumps(x), flush=True)\n"
        script = tmp_path / "program.py"
        script.write_text(prefix + textwrap.dedent(source))
        full = {**os.environ, "OMP_NUM_THREADS": "1", **env}
        if path is not None:
            full["PYTHONPATH"] = os.pathsep.join([str(path), full.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, str(script)],
            env=full, capture_output=True, text=True, timeout=_DEADLINE_S, check=False,
        )  # fmt: skip
        lines = [line[1:] for line in done.stdout.splitlines() if line.startswith("@")]
        assert lines, f"no answer, code {done.returncode}: {done.stderr[-2000:]}"
        return json.loads(lines[-1])

    return run


@pytest.fixture
def plugin(tmp_path):
    """Installs a module of a vendor's name that does what its source says."""

    def make(module: str, source: str, *, autoload: bool = False) -> Path:
        root = tmp_path / "site"
        (root / module).mkdir(parents=True)
        (root / module / "__init__.py").write_text(textwrap.dedent(source))
        info = root / f"{module}-0.0.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 0.0.0\n")
        if autoload:
            text = f"[torch.backends]\n{module} = {module}:_autoload\n"
            (info / "entry_points.txt").write_text(text)
        return root

    return make
