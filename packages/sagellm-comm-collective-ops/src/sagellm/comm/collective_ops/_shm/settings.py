"""The options of shm, checked on each rank and compared between ranks; and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sagellm.core.protocols import ConfigError

from .engines import ENGINES, available_engines
from .identity import address_space, cpu_claim
from .layout import MAX_RANKS, PAGE, Layout
from .overrides import parse_overrides

__all__ = ["ShmSettings", "facts_of", "plan_layout"]

_MAILBOXES_BYTES = 8 << 20
_MAX_MAILBOX_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class ShmSettings:
    """What a group is made with; equal on all ranks.

    Attributes:
        engine: `auto`, `native` or `python`.
        slot_bytes: Bytes of one staging slot; every rank has two.
        arena_bytes: Address space of a rank's symmetric tensors; memory is taken as they are made.
        statistics: Whether calls are counted and timed.
        algorithms: Overrides such as `all_reduce:0-64k:one_shot`, separated by commas.

    """

    engine: str = "auto"
    slot_bytes: int = 262144
    arena_bytes: int = 16 << 30
    statistics: bool = True
    algorithms: str | None = None

    @classmethod
    def of(cls, name: str, options: Mapping[str, Any] | None) -> ShmSettings:
        """The settings that a caller's options ask for.

        Raises:
            ConfigError: An option that does not exist, or a value it cannot have.

        """
        given = dict(options or {})
        known = {f for f in cls.__dataclass_fields__}
        unknown = sorted(set(given) - known)
        if unknown:
            told = ", ".join(sorted(known))
            raise ConfigError(f"{name} has no option {', '.join(unknown)}; known: {told}")
        settings = cls(**given)
        if settings.engine not in ("auto", *ENGINES):
            raise ConfigError(f"engine {settings.engine!r} is not one of auto, {', '.join(ENGINES)}")
        for field, least in (("slot_bytes", PAGE), ("arena_bytes", 0)):
            value = getattr(settings, field)
            if not isinstance(value, int) or value < least or value % PAGE:
                raise ConfigError(
                    f"{field} {value!r} is not a multiple of {PAGE} of at least {least}"
                )
        if not isinstance(settings.statistics, bool):
            raise ConfigError(f"statistics {settings.statistics!r} is not True or False")
        if settings.algorithms is not None and not isinstance(settings.algorithms, str):
            raise ConfigError(f"algorithms {settings.algorithms!r} is not a string")
        parse_overrides(settings.algorithms)
        return settings


def facts_of(settings: ShmSettings) -> dict[str, Any]:  # Any: JSON
    """What the other ranks must know of this one."""
    return {
        "settings": asdict(settings),
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
    arena = 0 if bounded and ours["arena_bytes"] == ShmSettings().arena_bytes else ours["arena_bytes"]
    mailbox = min(_MAX_MAILBOX_BYTES, max(PAGE, _MAILBOXES_BYTES // size**2 // PAGE * PAGE))
    return Layout(size, ours["slot_bytes"], arena, mailbox)
