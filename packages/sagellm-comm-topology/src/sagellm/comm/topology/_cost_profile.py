"""What was measured, kept on disk for the next start, per topology and library version.

A file is untrusted text: whatever is in it, reading it gives measurements within the bounds of
`observe` or a `ConfigError` that names the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import msgspec

from sagellm.core.protocols import ConfigError

from ._cost_kept import MOST_CURVES, MOST_REPEATS, MOST_SIZES, Repeats
from ._cost_rows import MOST_NAME, MOST_RANKS, CurveKey, Sample, sample_of
from ._input import read_regular

__all__ = ["Profile", "default_folder", "load_profile", "profile_path", "save_profile"]

logger = logging.getLogger(__name__)

_VERSION = 2


class _Curve(msgspec.Struct):
    op: str
    algorithm: str
    group_size: int
    shape: str
    members: list[str]
    knots: list[tuple[int, list[float]]]


class _Head(msgspec.Struct):
    fingerprint: str
    library: str
    version: int = _VERSION


class _File(_Head, kw_only=True):
    """The file: whose measurements these are, and the measurements."""

    curves: list[_Curve]


class Profile(msgspec.Struct):
    """Measurements of one topology and library version.

    Attributes:
        repeats: Microseconds by payload, by curve.
        members: One group of each shape, as its devices were called where they were measured.

    """

    repeats: dict[CurveKey, Repeats]
    members: dict[str, tuple[str, ...]]

    @property
    def rows(self) -> int:
        """Measurements in it."""
        return sum(len(times) for knots in self.repeats.values() for times in knots.values())


def default_folder() -> Path:
    """The user's cache folder; read from the environment at each call."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sagellm-comm"


def profile_path(folder: Path, fingerprint: str, library: str) -> Path:
    """The file of one topology and library version."""
    text = f"{_VERSION}\0{fingerprint}\0{library}"
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    return folder / f"topology-cost-{name}.json"


def save_profile(
    folder: Path,
    fingerprint: str,
    library: str,
    curves: Sequence[tuple[CurveKey, Repeats]],
    members: Mapping[str, tuple[str, ...]],
) -> Path:
    """Write the file, whole or not at all; its path.

    Raises:
        OSError: The folder cannot be written.

    """
    path = profile_path(folder, fingerprint, library)
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    kept = [
        _Curve(*key, list(members.get(key.shape, ())), [(n, list(t)) for n, t in knots.items()])
        for key, knots in curves
    ]
    try:
        part.write_bytes(msgspec.json.encode(_File(fingerprint, library, curves=kept)))
        part.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()
    return path


def load_profile(folder: Path, fingerprint: str, library: str) -> Profile:
    """What was kept of this topology and library version; empty when there is nothing.

    Raises:
        ConfigError: The file is there and is no profile; the message names it, the value that
            cannot be, and what to do.

    """
    path = profile_path(folder, fingerprint, library)
    nothing = Profile({}, {})
    try:
        data = read_regular(os.fspath(path))
    except FileNotFoundError:
        return nothing
    except OSError as e:
        _refuse(path, e)
    try:
        head = msgspec.json.decode(data, type=_Head)
        if (head.version, head.fingerprint, head.library) != (_VERSION, fingerprint, library):
            logger.warning("%s is of another topology, library or release; it is left out", path)
            return nothing
        found = msgspec.json.decode(data, type=_File)
        if len(found.curves) > MOST_CURVES:
            raise ConfigError(f"{len(found.curves)} curves, more than the {MOST_CURVES} kept")
        return Profile(
            dict(_checked(i, curve) for i, curve in enumerate(found.curves)),
            {curve.shape: tuple(curve.members) for curve in found.curves if curve.shape},
        )
    except (msgspec.MsgspecError, ConfigError, RecursionError, UnicodeError) as e:
        _refuse(path, e)


def _refuse(path: Path, why: Exception) -> NoReturn:
    raise ConfigError(f"{path} is no cost profile ({why}); delete it and calibrate anew") from why


def _checked(index: int, curve: _Curve) -> tuple[CurveKey, Repeats]:
    where = f"curve {index}"
    if len(curve.shape) > MOST_NAME or len(curve.members) > MOST_RANKS:
        raise ConfigError(f"{where}: a shape of {len(curve.shape)} letters, at most {MOST_NAME}")
    if not 0 < len(curve.knots) <= MOST_SIZES:
        raise ConfigError(f"{where}: {len(curve.knots)} sizes, 1 to {MOST_SIZES} are kept")
    repeats: dict[int, list[float]] = {}
    key = None
    for nbytes, times in curve.knots:
        if nbytes in repeats or not 0 < len(times) <= MOST_REPEATS:
            raise ConfigError(
                f"{where}: size {nbytes} with {len(times)} times; each size is there once, with "
                f"1 to {MOST_REPEATS} times"
            )
        try:
            samples = list(_samples(curve, nbytes, times))
        except ConfigError as e:
            raise ConfigError(f"{where}: {e}") from None
        key = samples[0].key
        repeats[nbytes] = [sample.time_us for sample in samples]
    assert key is not None
    return key._replace(shape=curve.shape), repeats


def _samples(curve: _Curve, nbytes: int, times: Sequence[float]) -> Iterator[Sample]:
    for i, time_us in enumerate(times):
        row = {"op": curve.op, "algorithm": curve.algorithm, "group_size": curve.group_size}
        yield sample_of(i, {**row, "nbytes": nbytes, "time_us": time_us})
