"""What a group keeps of its own calls: statistics, and a recorder that is dumped on failure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final

import pydantic

from .config import Settings
from .errors import ConfigError

__all__ = ["OBSERVE_OPTIONS", "ObserveSettings", "check_options", "observe_settings"]

OBSERVE_OPTIONS: Final[Mapping[str, str]] = {
    "statistics": "False counts nothing (default: the setting `observe.statistics`, True)",
    "flight_entries": "calls kept by the flight recorder, 0 keeps none (512)",
    "flight_folder": "folder for the dump when the group fails or is aborted (none)",
}
"""Options that every tensor backend takes, whatever its library."""


def check_options(backend: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse what is neither known nor one of `OBSERVE_OPTIONS`.

    Raises:
        ConfigError: It names what is unknown, and lists what is known.

    """
    everything = {*known, *OBSERVE_OPTIONS}
    unknown = sorted(set(given) - everything)
    if unknown:
        listed = ", ".join(sorted(everything))
        raise ConfigError(f"{backend} has no option {', '.join(unknown)}; known: {listed}")


class ObserveSettings(Settings, package="observe"):
    """Section `observe` of the configuration.

    Attributes:
        statistics: Whether calls are counted and timed.
        flight_entries: How many of a group's last calls are kept; 0 keeps none.
        flight_folder: Where a group's dump is written when the group fails or is aborted; None
            writes none. It is made if it is not there.

    """

    statistics: bool = True
    flight_entries: Annotated[int, pydantic.Field(ge=0, le=1 << 20)] = 512
    flight_folder: str | None = None


def observe_settings(options: Mapping[str, Any]) -> ObserveSettings:  # Any: an option's own type
    """The settings as a backend's options and the configuration give them together.

    Raises:
        ConfigError: A value cannot be what it should be.

    """
    given = {name: options[name] for name in OBSERVE_OPTIONS if name in options}
    if "statistics" in given and not isinstance(given["statistics"], bool):
        raise ConfigError(f"option statistics is {given['statistics']!r}; pass True or False")
    return ObserveSettings.load(**given)
