"""How fast codecs are on this host: measured once, kept in a file.

The file is `$XDG_CACHE_HOME/sagellm-comm/kv_transfer-codecs-KEY.json` (`~/.cache` by default);
KEY stands for the machine, its CPUs and the versions of the libraries. Delete it to measure anew.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from .auto import Speed, label
from .compressor import Compressor
from .frame import Coding
from .layout import TensorLayout

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CodecSpeeds", "cache_path", "measure"]

_LIBRARIES = ("torch", "numpy", "zstandard", "lz4", "xxhash", "sagellm-comm-kv-transfer")
_REPEATS = 3
_LAYOUT = TensorLayout(("kv", "token", "head", "dim"))


def cache_path() -> Path:
    """Where this host's speeds are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sagellm-comm" / f"kv_transfer-codecs-{_host_key()}.json"


@functools.cache
def _host_key() -> str:
    facts = [platform.machine(), platform.python_version(), str(os.cpu_count())]
    with contextlib.suppress(OSError):
        facts.append(Path("/etc/machine-id").read_text().strip())
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        facts += [line for line in lines if line.startswith(("model name", "flags"))][:2]
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts.append(f"{name} {importlib.metadata.version(name)}")
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


class CodecSpeeds:
    """What is known of this host's codecs, in memory and in the file. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, Speed] | None = None
        self._measuring = threading.Lock()

    def get(self, coding: Coding, dtype: str) -> Speed | None:
        """A speed that has been measured, here or by an earlier process; None without."""
        with self._lock:
            if self._known is None:
                self._known = _read()
            return self._known.get(_name(coding, dtype))

    def learn(self, coding: Coding, dtype: str) -> Speed:
        """A speed, measured now where it is not known: tens of milliseconds, once per host.

        Raises:
            CommError: The codec cannot be used here.

        """
        with self._measuring:  # one at a time, or they slow one another down
            if (known := self.get(coding, dtype)) is not None:
                return known
            found = measure(coding, dtype)
            with self._lock:
                self._known = {**_read(), **(self._known or {}), _name(coding, dtype): found}
                _write(self._known)
            return found


def measure(coding: Coding, dtype: str) -> Speed:
    """The speed of a codec on values such as a model's, by one thread; the best of three."""
    import torch

    cache = _sample(dtype)
    out = torch.empty_like(cache)
    with Compressor.of(coding) as codec:
        encode_s = decode_s = float("inf")
        for _ in range(_REPEATS):
            start = time.perf_counter()
            frame = codec.encode(cache, _LAYOUT)
            middle = time.perf_counter()
            codec.decode(frame, out)
            encode_s = min(encode_s, middle - start)
            decode_s = min(decode_s, time.perf_counter() - middle)
    size = cache.nbytes
    return Speed(size / len(frame), size / encode_s, size / decode_s)


def _sample(dtype: str) -> Tensor:
    """Values [2, tokens, heads, dim]: channels of K differ in mean and spread, heads of V."""
    import torch

    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 512, 8, 128, generator=rng)
    x[0] *= torch.randn(8, 128, generator=rng).mul(0.7).exp()
    x[0] += torch.randn(8, 128, generator=rng)
    x[1] *= torch.randn(8, 1, generator=rng).mul(0.5).exp()
    wanted = getattr(torch, dtype)
    return x.to(wanted) if wanted.is_floating_point else x.mul(16).round().to(wanted)


def _name(coding: Coding, dtype: str) -> str:
    return f"{label(coding)} {dtype}"


def _read() -> dict[str, Speed]:
    try:
        held = json.loads(cache_path().read_text())
        return {str(n): Speed(*(float(v) for v in s)) for n, s in held.items() if _sane(s)}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _sane(values: object) -> bool:
    return (
        isinstance(values, list)
        and len(values) == 3
        and all(isinstance(v, int | float) and 0 < v < 1e15 for v in values)
    )


def _write(known: dict[str, Speed]) -> None:
    path = cache_path()
    text = json.dumps(
        {n: [s.ratio, s.encode_bytes_per_s, s.decode_bytes_per_s] for n, s in known.items()}
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=path.name, delete=False
        ) as file:
            file.write(text)
        Path(file.name).replace(path)
    except OSError:  # a home that cannot be written to: every process measures for itself
        return
