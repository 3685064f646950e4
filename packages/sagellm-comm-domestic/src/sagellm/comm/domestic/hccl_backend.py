"""Ascend's HCCL."""

from __future__ import annotations

from sagellm.core.protocols import UnsupportedOperationError

from .backend import DomesticBackend

__all__ = ["HCCLBackend"]


class HCCLBackend(DomesticBackend):
    """Collectives on Huawei Ascend through torch_npu. Unverified on hardware.

    Options are the keys of `hccl_config` (`hccl_buffer_size`, `hccl_algo`, …); they reach
    HCCL when the group is made, also in groups made by `split`.
    """

    def comm_name(self) -> str:
        """Name of the HCCL communicator, which fused MoE operators take; makes it if need be.

        Raises:
            UnsupportedOperationError: A world of one has no communicator.

        """
        group = self.library_group
        if group is None:
            raise UnsupportedOperationError("a world of one has no HCCL communicator")
        name: str = group.get_hccl_comm_name(self.rank)
        return name
