"""What was measured, kept on disk for the next start, per topology and library version."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import msgspec

from sagellm.core.protocols import ConfigError

__all__ = ["default_folder", "load_rows", "profile_path", "save_rows"]

logger = logging.getLogger(__name__)

_VERSION = 1
_MAX_BYTES = 64 << 20


class _Profile(msgspec.Struct):
    """The file: whose measurements these are, and the measurements."""

    fingerprint: str
    library: str
    rows: list[dict[str, Any]]  # Any: checked by `observe`
    version: int = _VERSION


def default_folder() -> Path:
    """The user's cache folder; read from the environment at each call."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sagellm-comm"


def profile_path(folder: Path, fingerprint: str, library: str) -> Path:
    """The file of one topology and library version."""
    name = hashlib.sha256(f"{fingerprint}\0{library}".encode()).hexdigest()[:16]
    return folder / f"topology-cost-{name}.json"


def save_rows(folder: Path, fingerprint: str, library: str, rows: list[dict[str, Any]]) -> Path:
    """Write the file, whole or not at all; its path.

    Raises:
        OSError: The folder cannot be written.

    """
    path = profile_path(folder, fingerprint, library)
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        part.write_bytes(msgspec.json.encode(_Profile(fingerprint, library, rows)))
        part.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()
    return path


def load_rows(folder: Path, fingerprint: str, library: str) -> list[dict[str, Any]]:
    """The rows of this topology and library version; none when there are none for it.

    Raises:
        ConfigError: The file is there and cannot be read as a profile; the message names it.

    """
    path = profile_path(folder, fingerprint, library)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path} has more than {_MAX_BYTES} bytes; delete and calibrate anew")
        profile = msgspec.json.decode(path.read_bytes(), type=_Profile)
    except FileNotFoundError:
        return []
    except (OSError, msgspec.MsgspecError) as e:
        raise ConfigError(f"{path} is no cost profile ({e}); delete it and calibrate anew") from e
    stale = (profile.version, profile.fingerprint, profile.library) != (
        _VERSION,
        fingerprint,
        library,
    )
    if stale:
        logger.warning("%s is of another topology, library or release; it is left out", path)
        return []
    return profile.rows
