"""A store of plain files, for ranks that share a folder and no torch.distributed store."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from pathlib import Path

from sagellm.core.protocols import CommTimeoutError, ConfigError, IntegrityError

from ._wire import MAX_ENCODED_BYTES

__all__ = ["FileStore"]

_FIRST_POLL_S = 0.001
_LAST_POLL_S = 0.05


class FileStore:
    """Keys as files in a folder that all ranks share; values appear whole or not at all.

    Who may write to the folder is trusted: it is made for its owner alone. Use a fresh folder for
    each job, as keys stay. Safe between threads, processes and, on file systems where creating a
    file exclusively is atomic, hosts.

    Args:
        folder: Created if it is not there.
        timeout_s: How long `get` waits for a key.

    Raises:
        OSError: The folder cannot be made.

    """

    def __init__(self, folder: Path | str, *, timeout_s: float = 30.0) -> None:
        if not timeout_s > 0:
            raise ConfigError(f"timeout_s must be above 0, not {timeout_s}")
        self._folder = Path(folder)
        self._timeout_s = timeout_s
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def set(self, key: str, value: str) -> None:
        """Store `value` under `key`.

        Raises:
            ConfigError: The value is longer than 16 MiB.

        """
        data = value.encode()
        if len(data) > MAX_ENCODED_BYTES:
            raise ConfigError(
                f"value of {len(data)} bytes for {key!r}, more than {MAX_ENCODED_BYTES}"
            )
        path = self._path(key)
        part = path.with_name(f"{path.name}.{os.getpid()}.{time.monotonic_ns()}")
        try:
            with open(part, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                part.unlink()

    def get(self, key: str) -> bytes:
        """Value of `key`; waits until it is there.

        Raises:
            CommTimeoutError: It was not there in time.
            IntegrityError: It is longer than 16 MiB.

        """
        end_s, pause_s = time.monotonic() + self._timeout_s, _FIRST_POLL_S
        while True:
            try:
                with open(self._path(key), "rb") as file:
                    data = file.read(MAX_ENCODED_BYTES + 1)
                break
            except FileNotFoundError:
                if time.monotonic() >= end_s:
                    raise CommTimeoutError(
                        f"nobody stored {key!r} in {self._folder} within {self._timeout_s} s"
                    ) from None
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LAST_POLL_S)
        if len(data) > MAX_ENCODED_BYTES:
            raise IntegrityError(f"value of {key!r} has more than {MAX_ENCODED_BYTES} bytes")
        return data

    def check(self, keys: list[str]) -> bool:
        """Whether every key is there. Never blocks."""
        return all(self._path(key).exists() for key in keys)

    def add(self, key: str, amount: int) -> int:
        """Add 1 to a counter that starts at 0, and return the new value.

        Raises:
            ConfigError: `amount` is not 1.

        """
        if amount != 1:
            raise ConfigError(f"a store of files counts by 1, not by {amount}")
        path, value = self._path(key), 1
        while True:
            try:
                os.close(os.open(f"{path}.count.{value}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                return value
            except FileExistsError:
                value += 1

    def _path(self, key: str) -> Path:
        return self._folder / hashlib.sha256(key.encode()).hexdigest()[:32]
