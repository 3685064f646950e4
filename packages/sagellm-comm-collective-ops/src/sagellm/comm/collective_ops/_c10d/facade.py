"""What torch asks of a process group besides calls: who it is, what it is called, how it ends."""

from __future__ import annotations

import torch
import torch.distributed as dist

from sagellm.core.protocols.process_group import TorchObject

from .names import ENTRY_POINTS

__all__ = ["Facade", "alias_older_names"]


def alias_older_names(cls: type) -> None:
    """Give every call of a class the names it has in other torch releases too."""
    for entry in ENTRY_POINTS:
        if entry.name in cls.__dict__:
            for name in entry.older:
                setattr(cls, name, cls.__dict__[entry.name])


_ProcessGroup: TorchObject = dist.ProcessGroup


class Facade(_ProcessGroup):  # type: ignore[misc]  # torch's stubs of it differ by release
    """A process group in Python that torch takes for one of its own.

    Subclasses define the calls and how the group ends (`set_timeout`, `abort`, `shutdown`, and the
    names with an underscore that torch has for them), and run `alias_older_names` on themselves.

    Args:
        rank: This rank in the group.
        size: Ranks.
        library: Name that `dist.get_backend` and messages give.
        store: The group's store; None where it has none.

    """

    # What torch asks of the backend of one device type; see `_get_backend`.
    supports_splitting = False
    supports_coalescing = False
    supports_time_estimate = False
    supports_reconfigure = False

    def __init__(self, rank: int, size: int, library: str, store: TorchObject) -> None:
        super().__init__(rank, size)
        self._size, self._rank = size, rank
        self._library, self._label, self._about = library, "", ""
        self._store = store

    # The C++ side calls these names; DeviceMesh and functional collectives fail without them.

    def getBackendName(self) -> str:  # noqa: N802  # torch's name
        return self._library

    def getRank(self) -> int:  # noqa: N802  # torch's name
        return self._rank

    def getSize(self) -> int:  # noqa: N802  # torch's name
        return self._size

    def setGroupName(self, name: str) -> None:  # noqa: N802  # torch's name
        self._label = name

    def getGroupName(self) -> str:  # noqa: N802  # torch's name
        return self._label

    def setGroupDesc(self, text: str) -> None:  # noqa: N802  # torch's name
        self._about = text

    def getGroupDesc(self) -> str:  # noqa: N802  # torch's name
        return self._about

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size

    def name(self) -> str:
        return self._library

    def _set_group_name(self, name: str) -> None:
        self._label = name

    def _set_group_desc(self, text: str) -> None:
        self._about = text

    @property
    def group_name(self) -> str:
        """Name in torch's registry of groups."""
        return self._label

    @property
    def group_desc(self) -> str:
        """What the group was made for."""
        return self._about

    def _get_backend(self, device: torch.device) -> TorchObject:
        """Ourselves for the CPU: torch looks for `supports_…` on what this gives."""
        if torch.device(device).type == "cpu":
            return self
        raise RuntimeError(f"No backend type associated with device type {device}")

    def get_group_store(self) -> TorchObject:
        """The store that the group was made with."""
        return self._store

    def _has_hooks(self) -> bool:
        return False

    def _get_sequence_number_for_group(self) -> int:
        return 0

    def _set_sequence_number_for_group(self) -> None:
        return None
