"""Which codec pays on a link: a cost model, and a choice that does not flutter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from sagellm.core.protocols import ConfigError

from .frame import Coding
from .quant import BOUND

__all__ = [
    "UNBOUNDED",
    "MaxError",
    "Speed",
    "candidates",
    "choose",
    "coded_seconds",
    "label",
    "quant_within",
]

MaxError: TypeAlias = Literal["lossless", "near"] | float
"""What a codec may change: nothing; 1/32; or at most so many standard deviations of a channel."""

NEAR = 1 / 32
UNBOUNDED = "fp8, int8 and int4 keep no bound in deviations of a channel"
"""Why these are not among the candidates: their steps follow the largest value (`int4`: what the
smallest one is rounded by), which may be any number of deviations from zero."""
_GAIN = 0.95
"""What is chosen changes for an expected time below this part of the present one's."""


@dataclass(frozen=True, slots=True)
class Speed:
    """What a codec does to the values of a host.

    Attributes:
        ratio: Bytes of values per byte on the wire.
        encode_bytes_per_s: Of values, by one thread.
        decode_bytes_per_s: Of values, by one thread.

    """

    ratio: float
    encode_bytes_per_s: float
    decode_bytes_per_s: float


def quant_within(max_error: float) -> Coding:
    """`quant` whose error is at most so many standard deviations of a channel over 256 tokens.

    That holds before keys are rotated again and all is rounded to its dtype. K's steps are finer,
    which is what attention gains most from.

    Raises:
        ConfigError: No step gives that.

    """
    if not 1 / 256 <= max_error <= 8:
        raise ConfigError(f"max_error {max_error} is not in 1/256..8 standard deviations")
    return Coding("quant", {"step": 2.0 * max_error, "v": 0.5 / BOUND, "per_channel": True})


def candidates(max_error: MaxError) -> tuple[Coding, ...]:
    """What may be used, besides nothing.

    Raises:
        ConfigError: Not `lossless`, `near` or a number that a codec can keep.

    """
    exact = (Coding("lossless-fast"), Coding("lossless"))
    if max_error == "lossless":
        return exact
    if isinstance(max_error, bool) or not isinstance(max_error, int | float | str):
        raise ConfigError(f"max_error {max_error!r} is not 'lossless', 'near' or a number")
    if isinstance(max_error, str) and max_error != "near":
        raise ConfigError(f"max_error {max_error!r} is not 'lossless', 'near' or a number")
    return (*exact, quant_within(NEAR if max_error == "near" else float(max_error)))


def coded_seconds(
    nbytes: int, link_bytes_per_s: float, speed: Speed, *, workers: int, piece_bytes: int
) -> float:
    """How long a transfer takes through a codec, pipelined piece by piece with the wire.

        T = max(S / (n E), S / (R B), S / (n D)) + c / E + c / D

    S bytes of values in pieces of c; ratio R; B the link's rate; E and D what one thread encodes
    and decodes; n threads, no more than there are pieces. The slowest stage sets the pace, and
    the first piece must be encoded, the last one decoded, with nothing else to do.
    """
    piece = min(piece_bytes, nbytes)
    n = max(1, min(workers, -(-nbytes // max(1, piece))))
    encode, decode = speed.encode_bytes_per_s, speed.decode_bytes_per_s
    pace = max(1 / (n * encode), 1 / (speed.ratio * link_bytes_per_s), 1 / (n * decode))
    return nbytes * pace + piece / encode + piece / decode


def choose(
    nbytes: int,
    link_bytes_per_s: float,
    speeds: Sequence[tuple[Coding, Speed]],
    *,
    workers: int,
    piece_bytes: int,
    present: Coding | None,
) -> tuple[Coding | None, str]:
    """The codec with the shortest expected time, and why; None sends the bytes as they are.

    Args:
        nbytes: Of the transfer.
        link_bytes_per_s: As measured.
        speeds: What may be used.
        workers: Threads that may work at once, on either side.
        piece_bytes: Values coded at once.
        present: What is used now: it stays unless another is at least 5 % faster.

    """
    times: list[tuple[float, Coding | None]] = [(nbytes / link_bytes_per_s, None)]
    times += [
        (coded_seconds(nbytes, link_bytes_per_s, s, workers=workers, piece_bytes=piece_bytes), c)
        for c, s in speeds
    ]
    best_s, best = min(times, key=lambda entry: entry[0])
    now_s = next((t for t, c in times if c == present), math.inf)
    if best_s >= _GAIN * now_s:
        best = present
    expected = ", ".join(f"{label(c)} {t * 1e3:.4g} ms" for t, c in times)
    known = f"link {link_bytes_per_s / 1e6:.4g} MB/s, {workers} workers, {nbytes} bytes"
    return best, f"{known}: expected {expected}"


def label(coding: Coding | None) -> str:
    """The coding for people, `none` for the bytes as they are."""
    if coding is None:
        return "none"
    options = ", ".join(
        f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in coding.options.items()
    )
    return f"{coding.name}({options})" if options else coding.name
