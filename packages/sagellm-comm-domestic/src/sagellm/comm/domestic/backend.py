"""The adapter: one class for every vendor, told apart by its row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from sagellm.core.protocols import (
    BackendSpec,
    CommBackendProtocol,
    ConfigError,
    CostModelProtocol,
    CostTable,
    DomesticCommBackend,
    Efficiency,
    LinkClaim,
    TopologyManagerProtocol,
    UnsupportedOperationError,
)
from sagellm.core.protocols.process_group import ProcessGroupBackend

from .claims import rate
from .groups import OpenedGroup, close_group, split_group
from .options import delivered_options, vendor_options
from .self_test import run_self_test
from .vendor_spec import VendorSpec
from .vendors import find_vendor

if TYPE_CHECKING:
    import torch

__all__ = ["DomesticBackend"]

_Transport: TypeAlias = Any
"""Core's transport over a torch group; its class is not public."""


class DomesticBackend(ProcessGroupBackend, DomesticCommBackend):
    """A torch process group of a vendor's library. Unverified on hardware.

    `create_domestic_backend` makes one; the constructor takes a group that exists. What the
    library lacks is lowered by the rules of its row or refused by name, before it is called.

    Args:
        spec: From `specs`.
        process_group: The group; it must use the vendor's library for the vendor's device. None is
            a world of this process alone.
        owned: Whether `close` destroys the group.
        device: Where tensors live; None is the current device.
        timeout_s: Deadline of every call and wait that gives none.
        topology_manager: Kept for whoever asks.
        cost_model: Lets `explain` name an algorithm and a time.
        options: `check_calls`, and the library's, which the group must have been made with.

    Raises:
        ConfigError: An unknown option, one of another type, or one that the group was not made
            with; a device of another type.

    """

    _opened: OpenedGroup | None = None

    @classmethod
    def over(
        cls,
        spec: BackendSpec,
        opened: OpenedGroup,
        *,
        device: torch.device | str | None = None,
        timeout_s: float = 30.0,
        topology_manager: TopologyManagerProtocol | None = None,
        cost_model: CostModelProtocol | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> DomesticBackend:
        """A backend over a group from `open_group`; one that was made there is closed with it.

        It is closed at once when the backend cannot be made.
        """
        backend = cls.__new__(cls)
        backend._opened = opened
        try:
            ProcessGroupBackend.__init__(
                backend,
                spec,
                opened.group,
                owned=opened.owned,
                device=device,
                timeout_s=timeout_s,
                topology_manager=topology_manager,
                cost_model=cost_model,
                options=options,
            )
        except BaseException:
            close_group(opened)
            raise
        return backend

    def _init(
        self,
        spec: BackendSpec,
        transport: _Transport,
        timeout_s: float,
        topology_manager: TopologyManagerProtocol | None,
        cost_model: CostModelProtocol | None,
        options: Mapping[str, Any] | None,
        cost_table: CostTable | None,
    ) -> None:
        self._row = find_vendor(spec.name)
        self._library_options = vendor_options(self._row, options)
        super()._init(spec, transport, timeout_s, topology_manager, cost_model, options, cost_table)
        self._check_delivered()

    def _check_delivered(self) -> None:
        if not self._library_options:
            return
        held = delivered_options(self._row, self.library_group)
        if held is None and self._opened is not None:
            return  # made here with them, and the library does not show what it took
        wrong = [k for k, v in self._library_options.items() if (held or {}).get(k) != v]
        if wrong:
            raise ConfigError(
                f"options {', '.join(wrong)} did not reach {self.library}: the group holds "
                f"{held}; make it with create_domestic_backend({self.name!r}, options=...)"
            )

    # -- what a vendor adds -----------------------------------------------------------------

    @property
    def row(self) -> VendorSpec:
        """The vendor's facts."""
        return self._row

    @property
    def vendor(self) -> str:
        return self._row.vendor

    @property
    def library(self) -> str:
        return self._row.library

    @property
    def library_group(self) -> Any:  # noqa: ANN401  # a class of the vendor's own
        """The vendor's object beneath the torch group; None in a world of one."""
        import torch

        group: Any = self.process_group  # torch's stub lacks _get_backend
        return None if group is None else group._get_backend(torch.device(self._row.device))

    def link_claims(self) -> tuple[LinkClaim, ...]:
        return self._row.claims

    def efficiency(self, part: str, measured_bytes_per_s: float) -> Efficiency:
        return rate(self._row.claims, part, measured_bytes_per_s)

    def self_test(self) -> tuple[str, ...]:
        return run_self_test(self)

    # -- the group --------------------------------------------------------------------------

    def split(self, ranks: Sequence[int], name: str | None = None) -> CommBackendProtocol | None:
        if not self._library_options:
            return super().split(ranks, name)
        # torch gives a sub-group default options: one with its own has to be made here.
        chosen = [self.global_ranks[r] for r in ranks if 0 <= r < self.size]
        if len(chosen) != len(ranks) or sorted(set(chosen)) != chosen:
            raise UnsupportedOperationError(
                f"ranks {list(ranks)} of a group with options must be distinct, rising and within "
                f"0..{self.size - 1}"
            )
        label = name or f"{self.group_name}/{','.join(map(str, ranks))}"
        if self.rank not in ranks:
            return None
        opened = split_group(self._row, chosen, label, self.timeout_s, self._library_options)
        return type(self).over(
            self.spec,
            opened,
            device=self.device,
            timeout_s=self.timeout_s,
            topology_manager=self.topology_manager,
            cost_model=self.cost_model,
            options=self.options,
        )
