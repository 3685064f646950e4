"""What a collective should cost by formula: alpha per step, beta per byte, gamma per reduced byte.

n ranks, S bytes as nccl-tests count them: the buffer of all_reduce and broadcast, the larger
side of all_gather and reduce_scatter, one rank's buffer of all_to_all. Every formula is
`steps * alpha + moved * S * beta + reduced * S * gamma`, so two points fix its line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from sagellm.core.protocols import ConfigError, PathClass

__all__ = [
    "ALGORITHMS",
    "Coefficients",
    "LinkCost",
    "check",
    "check_op",
    "link_cost",
    "prior_us",
]


@dataclass(frozen=True, slots=True)
class LinkCost:
    """What one step over a link costs.

    Attributes:
        alpha_us: Fixed time of a step in microseconds.
        bytes_per_s: Bandwidth per direction.
        reduce_bytes_per_s: Speed of the reduction itself.

    """

    alpha_us: float
    bytes_per_s: float
    reduce_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Steps taken, and shares of the payload that are moved and reduced, one after the other."""

    steps: float
    moved: float
    reduced: float = 0.0


# Starting points of the orders that public tunings of collective libraries use; never measured
# here, replaced by the graph's bandwidth where that is known, and by the first calibration.
_PRIORS: Mapping[PathClass, LinkCost] = {
    "LOC": LinkCost(1.0, 200e9, 400e9),
    "LINK": LinkCost(4.0, 200e9, 800e9),
    "C2C": LinkCost(4.0, 200e9, 400e9),
    "PIX": LinkCost(6.0, 20e9, 400e9),
    "PXB": LinkCost(6.5, 20e9, 400e9),
    "PHB": LinkCost(7.0, 16e9, 200e9),
    "NODE": LinkCost(7.5, 14e9, 200e9),
    "SYS": LinkCost(8.0, 10e9, 100e9),
    "NET": LinkCost(14.0, 12e9, 200e9),
}

_Formula = Callable[[int], Coefficients]


def _log(n: int) -> int:
    return math.ceil(math.log2(n))


# A group whose ranks are no power of two folds the rest in first: one more step each way.
def _fold(n: int) -> int:
    return 0 if n & (n - 1) == 0 else 1


_FORMULAS: Mapping[str, Mapping[str, _Formula]] = {
    "all_reduce": {
        "ring": lambda n: Coefficients(2 * (n - 1), 2 * (n - 1) / n, (n - 1) / n),
        "tree": lambda n: Coefficients(2 * _log(n), 2 * _log(n), _log(n)),
        "recursive_doubling": lambda n: Coefficients(
            _log(n) + _fold(n), _log(n) + _fold(n), _log(n)
        ),
        "halving_doubling": lambda n: Coefficients(
            2 * _log(n) + _fold(n), 2 * (n - 1) / n + 2 * _fold(n), (n - 1) / n + _fold(n)
        ),
        "direct": lambda n: Coefficients(1, n - 1, n - 1),
        "two_shot": lambda n: Coefficients(2, 2 * (n - 1) / n, (n - 1) / n),
    },
    "all_gather": {
        "ring": lambda n: Coefficients(n - 1, (n - 1) / n),
        "recursive_doubling": lambda n: Coefficients(_log(n), (n - 1) / n + _fold(n)),
        "direct": lambda n: Coefficients(1, (n - 1) / n),
    },
    "reduce_scatter": {
        "ring": lambda n: Coefficients(n - 1, (n - 1) / n, (n - 1) / n),
        "halving_doubling": lambda n: Coefficients(
            _log(n), (n - 1) / n + _fold(n), (n - 1) / n + _fold(n)
        ),
        "direct": lambda n: Coefficients(1, (n - 1) / n, (n - 1) / n),
    },
    "broadcast": {
        "ring": lambda n: Coefficients(2 * (n - 1), 2 * (n - 1) / n),
        "tree": lambda n: Coefficients(_log(n), _log(n)),
        "direct": lambda n: Coefficients(1, n - 1),
    },
    "all_to_all": {
        "direct": lambda n: Coefficients(1, (n - 1) / n),
        "pairwise": lambda n: Coefficients(n - 1, (n - 1) / n),
        "ring": lambda n: Coefficients(n - 1, (n - 1) / 2),
        "recursive_doubling": lambda n: Coefficients(_log(n), _log(n) / 2),
    },
    "p2p": {"direct": lambda n: Coefficients(1, 1.0)},
}

ALGORITHMS: Mapping[str, tuple[str, ...]] = {
    op: tuple(sorted({*table, *(("hierarchical",) if op in ("all_reduce", "broadcast") else ())}))
    for op, table in _FORMULAS.items()
}
"""Operation to the algorithms that have a formula."""


def link_cost(kind: PathClass | None, bytes_per_s: float | None = None) -> LinkCost:
    """The prior of a path class; a bandwidth that is known replaces its guess.

    A path of unknown class is taken for the slowest way within a host.
    """
    prior = _PRIORS[kind or "SYS"]
    if bytes_per_s:
        return LinkCost(prior.alpha_us, bytes_per_s, prior.reduce_bytes_per_s)
    return prior


def prior_us(
    op: str, algorithm: str, nbytes: int, size: int, link: LinkCost, *, local: tuple[int, LinkCost]
) -> float:
    """Microseconds by formula.

    Args:
        op: Operation.
        algorithm: One of `ALGORITHMS[op]`.
        nbytes: Payload.
        size: Ranks; 1 costs nothing.
        link: Slowest link of the group.
        local: Ranks per host and their slowest link, for `hierarchical`.

    """
    if size == 1:
        return 0.0
    if algorithm != "hierarchical":
        return _cost(_FORMULAS[op][algorithm](size), nbytes, link)
    inner, inner_link = max(1, min(local[0], size)), local[1]
    outer = math.ceil(size / inner)
    total = 0.0
    if op == "all_reduce":
        if inner > 1:
            total += _cost(_FORMULAS["reduce_scatter"]["ring"](inner), nbytes, inner_link)
            total += _cost(_FORMULAS["all_gather"]["ring"](inner), nbytes, inner_link)
        if outer > 1:
            # Each rank of a host carries its share; together they share the host's way out.
            total += _cost(_FORMULAS["all_reduce"]["ring"](outer), nbytes / inner, link)
    else:
        if outer > 1:
            total += _cost(_FORMULAS["broadcast"]["tree"](outer), nbytes, link)
        if inner > 1:
            total += _cost(_FORMULAS["broadcast"]["ring"](inner), nbytes, inner_link)
    return total


def _cost(c: Coefficients, nbytes: float, link: LinkCost) -> float:
    seconds = nbytes * (c.moved / link.bytes_per_s + c.reduced / link.reduce_bytes_per_s)
    return c.steps * link.alpha_us + 1e6 * seconds


def check_op(op: object) -> None:
    """Refuse an unknown op.

    Raises:
        ConfigError: The message lists the known ones.

    """
    if not isinstance(op, str) or op not in ALGORITHMS:
        raise ConfigError(f"unknown op {op!r}; known: {', '.join(ALGORITHMS)}")


def check(op: str, algorithm: str, known: Collection[str]) -> None:
    """Refuse what has neither a formula nor a measurement.

    Raises:
        ConfigError: The message lists the known names.

    """
    if algorithm not in known:
        raise ConfigError(f"{op} has no algorithm {algorithm!r}; known: {', '.join(known)}")
