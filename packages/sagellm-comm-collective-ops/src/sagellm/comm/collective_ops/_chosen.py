"""What every backend over a torch process group does to choose algorithms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sagellm.core.protocols import Choice, ConfigError
from sagellm.core.protocols.process_group import ProcessGroupBackend, Transport

from ._scheduled import ScheduledTransport, agree_on_algorithms
from .choice import AlgorithmTable, explain_choice, measured_table, parse_algorithms
from .settings import CollectiveSettings

__all__ = ["ChosenBackend", "asked_algorithms"]


def asked_algorithms(
    options: Mapping[str, Any],  # Any: each option has its own type
    known: Mapping[str, list[str]] | None = None,
) -> AlgorithmTable:
    """The table that the option `algorithms` gives, else the setting of that name.

    Raises:
        ConfigError: It is not a string, or `parse_algorithms` does not take it.

    """
    if options.get("algorithms") is not None:
        text = options["algorithms"]
        if not isinstance(text, str):
            raise ConfigError(f"option algorithms is {text!r}, not a string")
        return parse_algorithms(text, known)
    settings = CollectiveSettings.load()
    source = f"{settings.origin('algorithms')} (algorithms)"
    return parse_algorithms(settings.algorithms, known, source)


class ChosenBackend(ProcessGroupBackend):
    """A process group whose calls may be run by schedules of this package."""

    _tables: tuple[AlgorithmTable, ...] = ()
    _scheduled: ScheduledTransport | None = None

    def _layer(self, transport: Transport, timeout_s: float) -> Transport:
        asked = asked_algorithms(self.options)
        self._tables = (asked,)
        if transport.size == 1:
            return transport
        store = getattr(transport, "store", None)
        if store is not None:
            agree_on_algorithms(
                store, transport.group_name, transport.rank, transport.size, asked, timeout_s
            )
        self._scheduled = ScheduledTransport(transport, self._tables)
        return self._scheduled

    def _use_measured(self) -> None:
        """Let a cost table that holds curves of the library and of schedules choose, too.

        Called once the table is the same on all ranks.
        """
        if self._cost_table is None or self._scheduled is None:
            return
        source = f"cost table {self._cost_table.fingerprint}"
        measured = measured_table(self._cost_table, self.size, source)
        self._tables = (*self._tables[:1], measured)
        self._scheduled.tables = self._tables

    def explain(self, op: str, nbytes: int) -> Choice:
        """What would run for such a call: a schedule that was asked for or measured, or native."""
        return explain_choice(self._tables, self._native_choice(op, nbytes), op, nbytes, self.size)

    def _native_choice(self, op: str, nbytes: int) -> Choice:
        """What the library would run."""
        return super().explain(op, nbytes)
