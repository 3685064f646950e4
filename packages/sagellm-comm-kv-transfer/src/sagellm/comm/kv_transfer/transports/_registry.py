"""Transports found by entry point."""

from __future__ import annotations

from collections.abc import Callable

from sagellm.core.protocols import BackendUnavailableError, KVTransport, TransportSpec
from sagellm.core.protocols.registry import Registry

__all__ = ["TRANSPORT_GROUP", "load_transport"]

TRANSPORT_GROUP = "sagellm.comm.kv_transfer.transports"

_registry: Registry[TransportSpec] = Registry(TRANSPORT_GROUP)


def load_transport(name: str) -> Callable[..., KVTransport]:
    """What makes the transport of that name.

    Raises:
        ConfigError: No such transport; the message lists the installed ones.
        BackendUnavailableError: What it needs is missing.

    """
    spec = _registry.load(name)
    probe = spec.probe()
    if not probe.available:
        raise BackendUnavailableError(f"transport {name!r}: {probe.reason}")
    return spec.load()
