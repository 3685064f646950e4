"""Ascend's HCCL."""

from __future__ import annotations

from .backend import DomesticBackend

__all__ = ["HCCLBackend"]


class HCCLBackend(DomesticBackend):
    """Collectives on Huawei Ascend through torch_npu. Unverified on hardware.

    Options are the keys of `hccl_config` (`hccl_buffer_size`, `hccl_algo`, …); they reach
    HCCL when the group is made, also in groups made by `split`.
    """

    def comm_name(self) -> str:
        """Name of the HCCL communicator, which fused MoE operators take; makes it if need be."""
        name: str = self.library_group.get_hccl_comm_name(self.rank)
        return name
