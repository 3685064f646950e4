"""Which engines this process has, which one a group takes, and making it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sagellm.core.protocols import BackendUnavailableError, ConfigError

from .engine import EngineFactory
from .identity import machine

__all__ = ["ENGINES", "agree_engine", "available_engines", "engine_factory"]

ENGINES = ("native", "python")
"""By preference."""


def available_engines() -> dict[str, str]:
    """The engines that work in this process, each with the version that all ranks must share.

    No engine is loaded twice; what is missing is simply not in the answer.
    """
    found: dict[str, str] = {}
    if machine() == "x86_64":
        found["python"] = "1"
    return found


def agree_engine(wanted: str, offers: Sequence[Mapping[str, Any]]) -> str:
    """The engine of a group: `wanted`, or the best one that every rank has alike.

    Args:
        wanted: `auto`, `native` or `python`.
        offers: Every rank's `available_engines`.

    Raises:
        BackendUnavailableError: Some rank lacks it; it is named.

    """
    lacking: dict[str, str] = {}
    for name in ENGINES if wanted == "auto" else (wanted,):
        versions = {r: offer.get(name) for r, offer in enumerate(offers)}
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
    if name == "python":
        from .python_engine import PythonEngine

        return PythonEngine
    raise ConfigError(f"engine {name!r} is not one of {', '.join(ENGINES)}")
