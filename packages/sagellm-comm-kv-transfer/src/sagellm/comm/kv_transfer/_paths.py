"""Which transports a channel has, and which of them leads to a peer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sagellm.core.protocols import (
    BackendUnavailableError,
    ConfigError,
    KVTransport,
    TransportSpec,
)

from .transports._registry import load_spec, transport_names

__all__ = ["AUTO", "Choice", "Paths"]

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Choice:
    """What can be tried with a peer.

    Attributes:
        names: Transports that both have and that may work, the best first.
        refused: The others, and why.

    """

    names: tuple[str, ...]
    refused: Mapping[str, str]


class Paths:
    """The open transports of one channel, the best first.

    Args:
        choice: `auto`, or the name of the only transport to use.
        arguments: What factories of transports are called with.

    Raises:
        ConfigError: No transport of that name; the message lists the installed ones.
        BackendUnavailableError: It cannot be used here, or with `auto` none can; the message
            says why.

    """

    def __init__(self, choice: str, arguments: Mapping[str, object]) -> None:
        self.choice = choice
        self.absent: dict[str, str] = {}
        self._specs: dict[str, TransportSpec] = {}
        self._open: dict[str, KVTransport] = {}
        found: list[TransportSpec] = []
        for name in transport_names() if choice == AUTO else [choice]:
            try:
                spec = load_spec(name)
            except BackendUnavailableError as e:
                self._refuse(name, e)
                continue
            if choice == AUTO and spec.priority < 0:
                self.absent[name] = "it is taken by name only"
            else:
                found.append(spec)
        try:
            for spec in sorted(found, key=lambda s: -s.priority):
                try:
                    probe = spec.probe()
                    if not probe.available:
                        raise BackendUnavailableError(f"{probe.reason} {spec.install_hint}".strip())
                    self._open[spec.name] = spec.load()(**arguments)
                    self._specs[spec.name] = spec
                except BackendUnavailableError as e:
                    self._refuse(spec.name, e)
        except BaseException:
            self.close()
            raise
        if not self._open:
            raise BackendUnavailableError(f"no transport can be used here: {self.absent}")

    def _refuse(self, name: str, error: BackendUnavailableError) -> None:
        """Note that a transport cannot be used; an error when it is the one that was asked for."""
        if self.choice != AUTO:
            raise BackendUnavailableError(f"transport {name!r}: {error}") from error
        self.absent[name] = str(error)

    def __getitem__(self, name: str) -> KVTransport:
        return self._open[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._open)

    def __contains__(self, name: object) -> bool:
        return name in self._open

    @property
    def rejected(self) -> int:
        """Connections that presented no good token, over all transports."""
        return sum(getattr(t, "rejected", 0) for t in self._open.values())

    def lanes(self, name: str) -> tuple[int, int]:
        """Connections per peer to begin with, and at most."""
        spec = self._specs[name]
        return spec.start_lanes, spec.max_lanes

    def one_sided(self, name: str) -> bool:
        """Whether receivers read the memory of senders."""
        return self._specs[name].one_sided

    def endpoints(self, reached_at: str) -> dict[str, str]:
        """What a peer needs to reach each of them; the peer has reached us at that host."""
        return {name: t.endpoint(reached_at) for name, t in self._open.items()}

    def choose(self, theirs: Mapping[str, str]) -> Choice:
        """What to try with a peer that has these endpoints.

        Raises:
            ConfigError: There is no transport that both have.

        """
        names: list[str] = []
        refused = dict(self.absent)
        for name, transport in self._open.items():
            if name not in theirs:
                refused[name] = "the peer has it not"
                continue
            probe = transport.reaches(theirs[name])
            if probe.available:
                names.append(name)
            else:
                refused[name] = probe.reason
        for name in sorted(set(theirs) - set(self._open) - set(refused)):
            refused[name] = "not installed here" if self.choice == AUTO else "not asked for"
        if not names:
            why = "; ".join(f"{n}: {r}" for n, r in sorted(refused.items()))
            raise ConfigError(f"no transport leads there: {why}")
        return Choice(tuple(names), refused)

    def close(self) -> None:
        """Close every transport. Idempotent."""
        for transport in self._open.values():
            transport.close()
