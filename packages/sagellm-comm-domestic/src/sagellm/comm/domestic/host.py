"""The host as detection sees it, so that a recorded or invented one can stand in for it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

__all__ = ["HostView"]


def _find_module(name: str) -> bool:
    if name in sys.modules:
        return True
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _distribution_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _autoloads() -> tuple[str, ...]:
    return tuple(entry.module for entry in entry_points(group="torch.backends"))


def _torch_version_file() -> Path | None:
    try:
        spec = importlib.util.find_spec("torch")
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).with_name("version.py")


@dataclass(frozen=True, slots=True)
class HostView:
    """Ways to look at a host without importing a plug-in or opening a device.

    Attributes:
        environ: Environment variables.
        root: Where `/dev`, `/sys` and tools' fixed places are looked for.
        find_module: Whether a top-level module is installed; imports nothing.
        distribution_version: Version of an installed distribution, or None.
        autoloads: Modules that torch imports by itself (entry points of `torch.backends`).
        which: Full path of a command on PATH, or None.
        torch_version_file: torch's `version.py`, or None without torch.
        loaded: Whether a module has been imported in this process.

    """

    environ: Mapping[str, str]
    root: Path = Path("/")
    find_module: Callable[[str], bool] = _find_module
    distribution_version: Callable[[str], str | None] = _distribution_version
    autoloads: Callable[[], tuple[str, ...]] = _autoloads
    which: Callable[[str], str | None] = shutil.which
    torch_version_file: Callable[[], Path | None] = _torch_version_file
    loaded: Callable[[str], bool] = sys.modules.__contains__

    @classmethod
    def local(cls) -> HostView:
        """This host and this process."""
        return cls(environ=os.environ)

    def nodes(self, patterns: tuple[str, ...]) -> tuple[str, ...]:
        """Paths below the root that match, as the host would name them."""
        found = {p for pattern in patterns for p in self.root.glob(pattern)}
        return tuple(sorted(f"/{p.relative_to(self.root).as_posix()}" for p in found))

    def tool(self, name: str | None, places: tuple[str, ...] = ()) -> str | None:
        """Where a vendor's tool is: on PATH, else in its fixed places."""
        if name is None:
            return None
        on_path = self.which(name)
        if on_path is not None:
            return on_path
        return next((f"/{place}" for place in places if (self.root / place).is_file()), None)
