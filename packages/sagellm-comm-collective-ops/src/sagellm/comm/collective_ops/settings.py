"""Settings of this package: `SAGELLM_COMM_COLLECTIVE_OPS_…`, or section `collective_ops:`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sagellm.core.protocols import ConfigError
from sagellm.core.protocols.config import Settings

__all__ = ["CollectiveSettings", "wants_calibration"]


class CollectiveSettings(Settings, package="collective_ops"):
    """What a user may set for every backend of this package; options of a backend win.

    >>> CollectiveSettings.load({}).algorithms
    ''

    Attributes:
        algorithms: Which algorithm runs which calls, such as `all_reduce:0-64k:direct`; see
            `parse_algorithms`.
        calibrate: Measure the algorithms when a gloo, shm or hier backend is made, or take what was
            measured here before.

    """

    algorithms: str = ""
    calibrate: bool = False


def wants_calibration(options: Mapping[str, Any]) -> bool:  # Any: each option has its own type
    """The option `calibrate`, else the setting."""
    wanted = options.get("calibrate")
    if wanted is None:
        return CollectiveSettings.load().calibrate
    if not isinstance(wanted, bool):
        raise ConfigError(f"option calibrate is {wanted!r}; pass True or False")
    return wanted
