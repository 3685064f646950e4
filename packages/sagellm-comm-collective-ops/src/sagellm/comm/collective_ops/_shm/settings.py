"""The options of shm, checked on each rank and compared between ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sagellm.comm.collective_ops.choice import (
    NATIVE,
    AlgorithmTable,
    algorithms_known,
    asked_algorithms,
    parse_algorithms,
)
from sagellm.comm.collective_ops.settings import wants_calibration
from sagellm.core.protocols import ConfigError
from sagellm.core.protocols.observe import check_options, observe_settings

from .choice import Override
from .engines import ENGINES, available_engines
from .identity import address_space, cpu_claim
from .layout import MAX_RANKS, OPS, PAGE, Layout

__all__ = ["KNOWN", "ShmSettings", "facts_of", "plan_layout"]

KNOWN = algorithms_known(
    {
        op: ("one_shot", "two_shot", "symmetric") if op == "all_reduce" else ("direct",)
        for op in OPS
    },
    schedules=False,
)
"""Algorithms that `algorithms` may name."""

_OF_ONE_RANK = ("statistics", "algorithms_from")
_EVER = 1 << 62
_MAX_RULES = 32
"""OVERRIDES in `_native.c`."""
_MAILBOXES_BYTES = 8 << 20
_MAX_MAILBOX_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class ShmSettings:
    """What a group is made with; equal on all ranks.

    Attributes:
        engine: `auto`, `native` or `python`.
        slot_bytes: Bytes of one staging slot; every rank has two.
        arena_bytes: Address space of a rank's symmetric tensors; memory is taken as they are made.
        statistics: Whether calls are counted and timed; each rank's own.
        algorithms: Overrides such as `all_reduce:0-64k:one_shot`, separated by commas.
        calibrate: Whether one_shot and two_shot are measured when the group is made.
        algorithms_from: Where those were read, for a person.

    """

    engine: str = "auto"
    slot_bytes: int = 262144
    arena_bytes: int = 16 << 30
    statistics: bool = True
    algorithms: str | None = None
    calibrate: bool = False
    algorithms_from: str = ""

    @classmethod
    def of(cls, name: str, options: Mapping[str, Any] | None) -> ShmSettings:
        """The settings that a caller's options ask for.

        Raises:
            ConfigError: An option that does not exist, or a value it cannot have.

        """
        given = dict(options or {})
        check_options(name, given, set(cls.__dataclass_fields__) - {"algorithms_from"})
        asked = asked_algorithms(given, KNOWN)
        own = {name: value for name, value in given.items() if name in cls.__dataclass_fields__}
        own["calibrate"] = wants_calibration(given)
        own["statistics"] = observe_settings(given).statistics
        own["algorithms"] = ",".join(sorted(map(str, asked.rules))) or None
        settings = cls(**own, algorithms_from=asked.source)
        if settings.engine not in ("auto", *ENGINES):
            raise ConfigError(
                f"engine {settings.engine!r} is not one of auto, {', '.join(ENGINES)}"
            )
        for field, least in (("slot_bytes", PAGE), ("arena_bytes", 0)):
            value = getattr(settings, field)
            if not isinstance(value, int) or value < least or value % PAGE:
                raise ConfigError(
                    f"{field} {value!r} is not a multiple of {PAGE} of at least {least}"
                )
        if len(settings.overrides()) > _MAX_RULES:
            raise ConfigError(
                f"{asked.source} has {len(settings.overrides())} rules; shm takes {_MAX_RULES}"
            )
        return settings

    @property
    def table(self) -> AlgorithmTable:
        """The rules of `algorithms`."""
        return parse_algorithms(self.algorithms or "", KNOWN, self.algorithms_from)

    def overrides(self) -> tuple[Override, ...]:
        """The rules as engines take them."""
        return tuple(
            (rule.op, rule.low, _EVER if rule.high is None else rule.high, rule.algorithm)
            for rule in self.table.rules
            if rule.algorithm != NATIVE
        )


def facts_of(settings: ShmSettings) -> dict[str, Any]:  # Any: JSON
    """What the other ranks must know of this one."""
    return {
        "settings": {k: v for k, v in asdict(settings).items() if k not in _OF_ONE_RANK},
        "engines": available_engines(),
        "space": address_space(),
        **cpu_claim(),
    }


def plan_layout(claims: Sequence[Mapping[str, Any]]) -> Layout:  # Any: JSON
    """The segment of a group, from everybody's facts.

    Raises:
        ConfigError: The ranks were given different options, or are too many.

    """
    size = len(claims)
    if size > MAX_RANKS:
        raise ConfigError(f"shm serves at most {MAX_RANKS} ranks of one host, not {size}")
    ours = claims[0]["settings"]
    for rank, said in enumerate(claims):
        for name, value in said["settings"].items():
            if value != ours[name]:
                raise ConfigError(
                    f"option {name} is {ours[name]!r} on rank 0 and {value!r} on rank {rank}; "
                    f"pass the same options on all ranks"
                )
    # Under a limit of address space there may be no room for arenas that nobody asked for.
    bounded = any(said["space"] is not None for said in claims)
    arena = (
        0 if bounded and ours["arena_bytes"] == ShmSettings().arena_bytes else ours["arena_bytes"]
    )
    mailbox = min(_MAX_MAILBOX_BYTES, max(PAGE, _MAILBOXES_BYTES // size**2 // PAGE * PAGE))
    return Layout(size, ours["slot_bytes"], arena, mailbox)
