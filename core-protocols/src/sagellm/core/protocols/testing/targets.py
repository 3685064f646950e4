"""What a suite is run on: `module:attribute`, or the name of an entry point."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sagellm.core.protocols.backend_spec import BackendSpec
from sagellm.core.protocols.comm_backend import CommBackendProtocol
from sagellm.core.protocols.errors import BackendUnavailableError, ConfigError
from sagellm.core.protocols.registry import Registry

__all__ = ["GROUPS", "BackendTarget", "factory_of", "name_of", "resolve"]

GROUPS = {
    "comm_backend": "sagellm.comm.backends",
    "transport": "sagellm.comm.kv_transfer.transports",
    "codec": "sagellm.comm.kv_transfer.codecs",
    "detector": "sagellm.comm.topology.detectors",
}
"""Entry-point group of each suite that has one; overlap managers are handed in, not looked up."""


def name_of(target: object) -> str:
    """What a report calls a target."""
    if isinstance(target, str):
        return target
    return str(getattr(target, "name", None) or getattr(target, "__qualname__", repr(target)))


def resolve(kind: str, name: object) -> Any:  # noqa: ANN401 - a class, function or spec
    """The object that `name` stands for; anything but a string stands for itself.

    Args:
        kind: Suite: a key of `GROUPS`, or `overlap_manager`.
        name: `package.module:attribute`, or an entry point's name where `GROUPS` has the suite.

    Raises:
        ConfigError: There is no such object.
        BackendUnavailableError: Its import failed.

    """
    if not isinstance(name, str):
        return name
    if ":" not in name:
        if kind not in GROUPS:
            raise ConfigError(f"{name!r} is not module:attribute, which {kind} is given by")
        return Registry[Any](GROUPS[kind]).load(name)
    module, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except ModuleNotFoundError as e:
        raise ConfigError(f"{name!r}: {e}") from e
    except ImportError as e:
        raise BackendUnavailableError(f"{name!r} cannot be imported: {e}") from e
    except AttributeError:
        raise ConfigError(f"module {module!r} has no {attribute!r}") from None
    return found


def factory_of(found: Any) -> Callable[..., Any]:  # noqa: ANN401 - as `resolve`
    """What makes an object: a class or function itself, or what a spec loads.

    Raises:
        BackendUnavailableError: The spec's probe says that it cannot work here.

    """
    if not hasattr(found, "load"):
        if not callable(found):
            raise ConfigError(f"{found!r} is neither a spec nor something that can be called")
        return found  # type: ignore[no-any-return]  # callable was checked
    _require_available(found)
    loaded: Any = found.load()
    # A detector's spec loads the detector itself, every other spec its class or factory.
    return (
        (lambda: loaded) if hasattr(loaded, "detect") and not isinstance(loaded, type) else loaded
    )


def _require_available(spec: Any) -> None:  # noqa: ANN401 - as `resolve`
    probe = getattr(spec, "probe", None)
    if probe is not None and not (probed := probe()).available:
        hint = getattr(spec, "install_hint", "")
        raise BackendUnavailableError(f"{spec.name}: {probed.reason}" + f" ({hint})" * bool(hint))


_MEETING_S = 30.0
"""Deadline of the torch group under a backend: ranks of a busy machine come seconds apart, however
short the deadline of the backend's own calls is."""

_worlds: dict[str, Any] = {}
_worlds_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class BackendTarget:
    """A comm backend to be made on every rank; picklable, so that ranks can be processes.

    What `name` stands for may be

    * a `BackendSpec` with a c10d name: a torch process group is made over a file and handed
      to what the spec loads, as `create_comm_backend` does;
    * a class `World(size, timeout_s=…)` with `backend(rank)`, for ranks that are threads of
      one process; also as attribute `in_process_world` of what a spec without a c10d name loads;
    * a function or class with `join(rank, size, meet, timeout_s=…)`, or a plain function with
      those arguments, that gives a rank's backend; `meet` is a path that is equal on the ranks
      of one group and used once.

    Attributes:
        name: `module:attribute`, an entry point's name, or the object itself; for ranks that
            are processes it must be picklable.

    """

    name: object

    def require_available(self) -> None:
        """Raise unless it can work on this host, as far as its spec's probe can tell.

        Raises:
            ConfigError: There is no such object.
            BackendUnavailableError: The probe refuses, or the import failed.

        """
        found = resolve("comm_backend", self.name)
        if isinstance(found, BackendSpec):
            _require_available(found)

    def in_process(self) -> bool:
        """Whether its ranks are threads of one process."""
        return _world_class(resolve("comm_backend", self.name)) is not None

    @contextmanager
    def make(
        self, rank: int, size: int, meet: str, timeout_s: float
    ) -> Iterator[CommBackendProtocol]:
        """This rank's backend for as long as the block, and closed after it."""
        found = resolve("comm_backend", self.name)
        world_class = _world_class(found)
        if world_class is not None:
            with _worlds_lock:
                if meet not in _worlds:
                    _worlds[meet] = world_class(size, timeout_s=timeout_s)
                world = _worlds[meet]
            yield from _closing(world.backend(rank))
        elif isinstance(found, BackendSpec) and found.c10d_name is not None:
            from .rank_pool import torch_group

            factory = factory_of(found)
            with torch_group(
                rank, size, meet, backend=found.c10d_name, timeout_s=max(timeout_s, _MEETING_S)
            ) as group:
                yield from _closing(factory(found, group, timeout_s=timeout_s))
        else:
            factory = factory_of(found)
            join = getattr(factory, "join", factory)
            yield from _closing(join(rank, size, meet, timeout_s=timeout_s))

    def forget(self, meet: str) -> None:
        """Drop what ranks of this process shared under `meet`."""
        with _worlds_lock:
            _worlds.pop(meet, None)


def _world_class(found: Any) -> Callable[..., Any] | None:  # noqa: ANN401 - as `resolve`
    if isinstance(found, BackendSpec):
        if found.c10d_name is not None:
            return None
        found = factory_of(found)
        world = getattr(found, "in_process_world", None)
        return world if callable(world) else None
    is_world = isinstance(found, type) and not issubclass(found, CommBackendProtocol)
    return found if is_world and callable(getattr(found, "backend", None)) else None


def _closing(backend: CommBackendProtocol) -> Iterator[CommBackendProtocol]:
    try:
        yield backend
    finally:
        backend.close()
