"""Plug-ins found by entry point, loaded when asked for, and told apart when broken."""

from __future__ import annotations

import difflib
import logging
import threading
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar, cast

from .errors import BackendUnavailableError, ConfigError

__all__ = ["Registry"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Registry(Generic[T]):
    """The plug-ins of one entry-point group. Thread-safe.

    Nothing is imported before it is asked for, and one broken plug-in never breaks another.

    Args:
        group: Entry-point group, such as `sagellm.comm.backends`.
        install_hints: For names that may be absent: the line that brings them.

    """

    def __init__(self, group: str, *, install_hints: Mapping[str, str] | None = None) -> None:
        self.group = group
        self._hints = dict(install_hints or {})
        self._lock = threading.Lock()
        self._loaded: dict[str, T] = {}
        self._broken: dict[str, BaseException] = {}
        self._entries: dict[str, EntryPoint] | None = None

    def names(self) -> tuple[str, ...]:
        """Names that are installed, sorted; none of them has been imported for this."""
        with self._lock:
            return tuple(sorted({*self._scan(), *self._loaded}))

    def add(self, name: str, plugin: T) -> None:
        """Offer a plug-in of this process; it hides an installed one of the same name."""
        with self._lock:
            self._loaded[name] = plugin
            self._broken.pop(name, None)

    def load(self, name: str) -> T:
        """The plug-in of that name, imported at its first use.

        Raises:
            ConfigError: No such name; the message lists the known ones, the nearest first, and
                the install line where one is known.
            BackendUnavailableError: It is installed, but its import failed.

        """
        with self._lock:
            if name in self._loaded:
                return self._loaded[name]
            if name in self._broken:
                raise self._unavailable(name) from self._broken[name]
            entry = self._scan().get(name)
            if entry is None:
                raise ConfigError(self._unknown(name))
            try:
                # The entry point's type is what its group promises; the conformance kit checks it.
                self._loaded[name] = cast("T", entry.load())
            except Exception as e:  # a plug-in may fail in any way it likes
                self._broken[name] = e
                raise self._unavailable(name) from e
            return self._loaded[name]

    def load_all(self) -> dict[str, T]:
        """Every plug-in that can be imported, by name; the others are in `broken`."""
        found: dict[str, T] = {}
        for name in self.names():
            try:
                found[name] = self.load(name)
            except BackendUnavailableError as e:
                logger.warning("%s", e)
        return found

    def broken(self) -> dict[str, str]:
        """Names whose import failed so far, with the failure."""
        with self._lock:
            return {name: f"{type(e).__name__}: {e}" for name, e in self._broken.items()}

    def _scan(self) -> dict[str, EntryPoint]:
        if self._entries is None:
            self._entries = {e.name: e for e in entry_points(group=self.group)}
        return self._entries

    def _unknown(self, name: str) -> str:
        known = sorted({*self._scan(), *self._loaded})
        near = difflib.get_close_matches(name, known, n=1)
        text = f"{self.group} has no {name!r}; installed: {', '.join(known) or 'none'}"
        if near:
            text += f"; did you mean {near[0]!r}?"
        if name in self._hints:
            text += f"; `{self._hints[name]}` brings it"
        elif self._hints:
            absent = [f"{n} (`{h}`)" for n, h in sorted(self._hints.items()) if n not in known]
            text += f"; can be installed: {', '.join(absent)}" if absent else ""
        return text

    def _unavailable(self, name: str) -> BackendUnavailableError:
        cause = self._broken[name]
        return BackendUnavailableError(
            f"{name!r} of {self.group} is installed but its import failed: "
            f"{type(cause).__name__}: {cause}"
        )
