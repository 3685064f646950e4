"""What one row of the vendor table holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from sagellm.core.protocols import EvidenceGrade, LinkClaim, Lowering

__all__ = ["Dispatch", "VendorSpec"]

Dispatch = Literal["privateuse1", "cuda", "any"]
"""How the device reaches torch: an own device type, an alias of `cuda`, or any of them."""


@dataclass(frozen=True, slots=True)
class VendorSpec:
    """The facts of one vendor's collective library, each as good as `grade` says.

    A row is identified by (`vendor`, `c10d_name`): several vendors share library names, and
    four of them answer to torch's `nccl`.

    Attributes:
        backend: Name for `create_domestic_backend` and `create_comm_backend`.
        vendor: Lower-case vendor, such as `huawei`.
        title: Name for people.
        library: Collective library, such as `HCCL`, whatever torch calls it.
        c10d_name: Name torch.distributed knows the library by.
        module: Python module whose import brings the device to torch; None when it is built in.
        device: torch device type of the tensors.
        dispatch: How the device reaches torch.
        grade: How well the row is known. Nothing in it was run on the device.
        source: Where the facts stand.
        aliases: Other names that users may mean by it.
        in_default_map: Whether a device without a backend name finds this one in torch.
        options: What reaches the library through `pg_options`: name to type and meaning.
        options_path: `module:attribute` of the options class; None when none can be delivered.
        options_attribute: Dictionary of that class that takes the options; None when each is an
            attribute of its own.
        reduce_ops: Reductions the library has.
        reduce_dtypes: Dtypes it reduces.
        move_dtypes: Dtypes it moves unchanged; empty when not known.
        lowering: Rules for what it lacks.
        uneven: Whether ranks may contribute different sizes.
        visible_env: Variables that hide devices from a process, the one that wins first.
        env: Other variables that change how it connects or fails, each with its meaning.
        libraries: Part of a shared library's name to what to do when it cannot be loaded.
        device_nodes: Patterns below the root of what the driver creates under `/dev`. Those of
            Ascend, Hygon and Kunlunxin were read; the others are from memory.
        tool: Vendor's management tool.
        tool_paths: Where the tool is when it is not on PATH.
        install_hint: What to install when the plug-in is missing.
        claims: Stated bandwidths.
        notes: What a caller should know, one sentence each.

    """

    backend: str
    vendor: str
    title: str
    library: str
    c10d_name: str
    module: str | None
    device: str
    dispatch: Dispatch
    grade: EvidenceGrade
    source: str
    install_hint: str
    aliases: tuple[str, ...] = ()
    in_default_map: bool | None = None
    options: Mapping[str, tuple[type, str]] = field(default_factory=dict)
    options_path: str | None = None
    options_attribute: str | None = None
    reduce_ops: frozenset[str] = frozenset()
    reduce_dtypes: frozenset[str] = frozenset()
    move_dtypes: frozenset[str] = frozenset()
    lowering: tuple[Lowering, ...] = ()
    uneven: bool = False
    visible_env: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    libraries: Mapping[str, str] = field(default_factory=dict)
    device_nodes: tuple[str, ...] = ()
    tool: str | None = None
    tool_paths: tuple[str, ...] = ()
    claims: tuple[LinkClaim, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, str]:
        """What identifies the row: vendor and torch's name for the library."""
        return (self.vendor, self.c10d_name)

    @property
    def status(self) -> str:
        """How far the row can be trusted, for tables and messages.

        Rows that rest on third parties or on nothing are called unverified outright.
        """
        if self.grade in ("third-party", "unverified"):
            return "unverified"
        return f"from {self.grade.replace('-', ' ')}, unverified on hardware"

    @property
    def backend_map(self) -> str:
        """The explicit map for `init_process_group`; CPU tensors stay with gloo."""
        return f"cpu:gloo,{self.device}:{self.c10d_name}"
