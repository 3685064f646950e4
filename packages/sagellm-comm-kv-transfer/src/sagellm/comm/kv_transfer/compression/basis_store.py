"""The bases that this process can decode with, by fingerprint.

    fingerprint = BASES.load("llama.basis.safetensors")
    Compressor("transform", basis=fingerprint)

A channel that sends frames of `transform` gives the receiver the basis once. Who moves frames by
other means brings `BASES.data(fingerprint)` to `BASES.put(data)`, which checks all of it. A
fingerprint is a hash of the contents; it detects damage and does not authenticate, so take bases
from authenticated peers.
"""

from __future__ import annotations

import threading
from pathlib import Path

from sagellm.core.protocols import ConfigError, ResourceError

from .basis import Basis

__all__ = ["BASES", "BasisStore"]


class BasisStore:
    """Checked bases up to a number of bytes. Thread-safe.

    Args:
        max_bytes: Of their files together; in memory a basis takes three times its file.

    """

    def __init__(self, max_bytes: int = 2 << 30) -> None:
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._held: dict[str, Basis] = {}

    def put(self, basis: Basis | bytes) -> str:
        """Keep a basis, or the bytes of one; its fingerprint. Putting one again is no error.

        Raises:
            IntegrityError: The bytes are no basis.
            ResourceError: It does not fit; nothing is thrown out for it, `drop` one.

        """
        self._room(len(basis if isinstance(basis, bytes) else basis.data))
        found = Basis(basis, max_bytes=self.max_bytes) if isinstance(basis, bytes) else basis
        with self._lock:
            if found.fingerprint not in self._held:
                self._check_room(len(found.data))
                self._held[found.fingerprint] = found
        return found.fingerprint

    def load(self, path: str | Path) -> str:
        """Keep the basis in a file; its fingerprint. Raises as `put`, and `OSError`."""
        return self.put(Basis.load(path, max_bytes=self.max_bytes))

    def get(self, fingerprint: str) -> Basis:
        """The basis of that fingerprint.

        Raises:
            ConfigError: It is not here; the message says which are, and how to get it.

        """
        with self._lock:
            found = self._held.get(fingerprint)
            names = ", ".join(name[:12] for name in self._held) or "none"
        if found is None:
            raise ConfigError(
                f"no basis {fingerprint[:40]!r} here (held: {names}); `BASES.load(path)` takes it "
                f"from its file, or the sender gives it"
            )
        return found

    def data(self, fingerprint: str) -> bytes:
        """The bytes that `put` takes elsewhere; raises as `get`."""
        return self.get(fingerprint).data

    @property
    def free_bytes(self) -> int:
        """Bytes of bases that there is room for."""
        with self._lock:
            return self.max_bytes - sum(len(b.data) for b in self._held.values())

    def drop(self, fingerprint: str) -> None:
        """Forget a basis; codecs that work with it keep it until they end."""
        with self._lock:
            self._held.pop(fingerprint, None)

    def __contains__(self, fingerprint: object) -> bool:
        with self._lock:
            return fingerprint in self._held

    def __len__(self) -> int:
        with self._lock:
            return len(self._held)

    def _room(self, nbytes: int) -> None:
        if nbytes > self.max_bytes:  # before it is parsed
            raise ResourceError(f"a basis of {nbytes} bytes; the store takes {self.max_bytes}")

    def _check_room(self, nbytes: int) -> None:
        held = sum(len(b.data) for b in self._held.values())
        if held + nbytes > self.max_bytes:
            raise ResourceError(
                f"a basis of {nbytes} bytes beside {held} held; the store takes {self.max_bytes}"
            )


BASES = BasisStore()
