"""What the workspace's own tests share: where the repository and its packages are."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Package:
    """A workspace member."""

    path: Path
    project: dict
    tool: dict

    @property
    def name(self) -> str:
        return self.project["name"].removeprefix("sagellm-").removeprefix("comm-").replace("-", "_")

    @property
    def module(self) -> str:
        return "sagellm.core.protocols" if self.is_core else f"sagellm.comm.{self.name}"

    @property
    def is_core(self) -> bool:
        return self.name == "core_protocols"

    @property
    def folder(self) -> Path:
        return self.path.joinpath("src", *self.module.split("."))


def _read(path: Path) -> Package:
    table = tomllib.loads((path / "pyproject.toml").read_text())
    return Package(path, table["project"], table["tool"])


PACKAGES = [_read(p) for p in [ROOT / "core-protocols", *sorted((ROOT / "packages").iterdir())]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `package` runs once for each of them."""
    if "package" in metafunc.fixturenames:
        metafunc.parametrize("package", PACKAGES, ids=[p.name for p in PACKAGES])


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def packages() -> list[Package]:
    return PACKAGES


@pytest.fixture(scope="session")
def tracked() -> list[Path]:
    """Every text file that git has, or would have at the next `git add`."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, check=True, text=True, timeout=30,
    ).stdout  # fmt: skip
    files = [ROOT / name for name in listed.split("\0") if name]
    return [f for f in files if f.is_file() and b"\0" not in f.read_bytes()[:4096]]


@pytest.fixture
def run_python(tmp_path):
    """Run a program in a new interpreter, away from the repository; answer what it printed."""

    def run(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=90
        )
        if check:
            assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
        return done

    return run
