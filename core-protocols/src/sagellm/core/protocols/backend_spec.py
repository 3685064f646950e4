"""What a backend says of itself before it is loaded: facts, capabilities, and how to probe it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .comm_backend import CommBackendProtocol

__all__ = [
    "BackendSpec",
    "Capabilities",
    "Lowering",
    "Probe",
]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can do, as plain data that can be compared and printed.

    Attributes:
        ops: Operations offered, by method name.
        reduce_ops: Reductions offered, as strings.
        dtypes: Dtypes that may be reduced, as torch names without the prefix (`float32`).
        move_dtypes: Dtypes that may be moved without arithmetic; empty means any.
        async_op: Whether `async_op=True` overlaps with the caller.
        uneven: Whether ranks may contribute different sizes.
        graph_capture: Whether calls may be captured in a device graph.
        symmetric_memory: Whether `empty()` returns memory that peers reach without staging.
        coalesce: Whether `coalesce()` saves anything.
        zero_dim: Whether 0-dimensional tensors are accepted.
        verified_on_hardware: False where nobody has run it on the device it is for.

    """

    ops: frozenset[str] = frozenset()
    reduce_ops: frozenset[str] = frozenset()
    dtypes: frozenset[str] = frozenset()
    move_dtypes: frozenset[str] = frozenset()
    async_op: bool = True
    uneven: bool = False
    graph_capture: bool = False
    symmetric_memory: bool = False
    coalesce: bool = False
    zero_dim: bool = True
    verified_on_hardware: bool = False


@dataclass(frozen=True, slots=True)
class Lowering:
    """A documented rule by which an unsupported call becomes supported ones.

    Attributes:
        when: What triggers it: an op (`all_to_all`), a reduction (`avg`) or a dtype (`bool`).
        rule: Name of the rule in `process_group` (`avg_as_sum_div`, `via_int32`, …).
        why: One sentence for `explain`.

    """

    when: str
    rule: str
    why: str


@dataclass(frozen=True, slots=True)
class Probe:
    """Whether a backend can run here, and why.

    Attributes:
        available: True when `load` followed by a group should work on this host.
        reason: One sentence; for a refusal it names what is missing and the next step.

    """

    available: bool
    reason: str


@dataclass(frozen=True, slots=True)
class BackendSpec:
    """What an entry point of group `sagellm.comm.backends` gives: facts, no imports, no torch.

    Attributes:
        name: Name users pass to `create_comm_backend`.
        device_types: torch device types it serves (`cuda`, `npu`, `cpu`).
        c10d_name: Name torch.distributed knows it by; None when it is not a c10d backend.
        priority: `auto` prefers the highest available one for the device.
        capabilities: What it can do.
        lowering: Rules for what it cannot.
        options: Names of the options it understands, with a line of explanation each.
        install_hint: What to install or source when it is missing.
        probe: Cheap test without side effects: no import of a vendor plug-in, no device context.
        load: Returns the backend class or factory; called once it has been chosen. What it
            returns is called as `load()(spec, group, device=, timeout_s=, topology_manager=,
            cost_model=, options=)`: `group` is a torch process group or None, `options` a mapping
            by name or None, and the others are as in `create_comm_backend`. A backend that is
            not c10d may have attribute `in_process_world`, a class `World(size, timeout_s=…)` with
            `backend(rank)`, or `join(rank, size, meet, timeout_s=…)`, a rank's backend; the
            conformance kit makes its ranks by it.
        vendor: Who makes the device; None for backends of the CPU.

    """

    name: str
    device_types: tuple[str, ...]
    c10d_name: str | None
    priority: int
    capabilities: Capabilities
    probe: Callable[[], Probe]
    load: Callable[[], Callable[..., CommBackendProtocol]]
    lowering: tuple[Lowering, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    install_hint: str = ""
    vendor: str | None = None
