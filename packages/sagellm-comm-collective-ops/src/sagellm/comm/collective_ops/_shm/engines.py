"""Which engines this process has, and which one a group takes. No torch until one is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sagellm.core.protocols import BackendUnavailableError, ConfigError

from .identity import machine
from .native_library import ABI, library

if TYPE_CHECKING:
    from .engine import EngineFactory

__all__ = ["ENGINES", "agree_engine", "available_engines", "engine_factory"]

ENGINES = ("native", "python")
"""By preference."""


def available_engines() -> dict[str, str]:
    """The engines that work in this process, each with the version that all ranks must share.

    What is missing is simply not in the answer.
    """
    found: dict[str, str] = {}
    if not isinstance(library(), str):
        found["native"] = f"{machine()} {ABI}"
    if machine() == "x86_64":
        found["python"] = "1"
    return found


def agree_engine(wanted: str, offers: Mapping[int, Mapping[str, Any]]) -> str:
    """The engine of a group: `wanted`, or the best one that every rank has alike.

    Args:
        wanted: `auto`, `native` or `python`.
        offers: `available_engines` by rank.

    Raises:
        BackendUnavailableError: Some rank lacks it; it is named.

    """
    lacking: dict[str, str] = {}
    for name in ENGINES if wanted == "auto" else (wanted,):
        versions = {r: offer.get(name) for r, offer in offers.items()}
        if None not in versions.values() and len(set(versions.values())) == 1:
            return name
        told = ", ".join(f"rank {r} {v or 'has none'}" for r, v in versions.items())
        lacking[name] = told
    text = "; ".join(f"{name}: {told}" for name, told in lacking.items())
    raise BackendUnavailableError(
        f"the ranks share no engine of shm ({text}); install the same wheel on all, or use gloo"
    )


def engine_factory(name: str) -> EngineFactory:
    """The class of an engine."""
    if name == "native":
        from .native_engine import NativeEngine

        return NativeEngine
    if name == "python":
        from .python_engine import PythonEngine

        return PythonEngine
    raise ConfigError(f"engine {name!r} is not one of {', '.join(ENGINES)}")
