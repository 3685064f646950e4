"""Transports found by entry point."""

from __future__ import annotations

from sagellm.core.protocols import TransportSpec
from sagellm.core.protocols.registry import Registry

__all__ = ["TRANSPORT_GROUP", "load_spec", "transport_names", "transport_registry"]

TRANSPORT_GROUP = "sagellm.comm.kv_transfer.transports"

transport_registry: Registry[TransportSpec] = Registry(TRANSPORT_GROUP)


def transport_names() -> tuple[str, ...]:
    """Names of the installed transports."""
    return transport_registry.names()


def load_spec(name: str) -> TransportSpec:
    """The transport of that name.

    Raises:
        ConfigError: No such transport; the message lists the installed ones.
        BackendUnavailableError: Its import failed.

    """
    return transport_registry.load(name)
