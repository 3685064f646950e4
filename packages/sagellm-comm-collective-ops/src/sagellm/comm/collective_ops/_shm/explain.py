"""Which algorithm of shm runs for a call, and what speaks against the others."""

from __future__ import annotations

from sagellm.comm.collective_ops.choice import NATIVE
from sagellm.core.protocols import Choice

from .choice import SYMMETRIC_BYTES, one_shot_bytes
from .flight import METHODS
from .transport import ShmTransport

__all__ = ["explain_shm"]

_PRIMITIVES = {method: primitive for primitive, method in METHODS.items()}


def explain_shm(
    backend: str, transport: ShmTransport, op: str, nbytes: int, estimate_us: float | None
) -> Choice:
    """What runs for a tensor that is not symmetric.

    Args:
        backend: Its name.
        transport: The group's.
        op: Method.
        nbytes: Bytes of one rank's input.
        estimate_us: What a cost model expects, None without one.

    """
    name = _PRIMITIVES.get(op, op)
    engine, settings = transport.engine, transport.settings
    algorithm = engine.algorithm(name, nbytes)
    rule = settings.table.pick(name, nbytes)
    reason = f"the {engine.name} engine, {transport.size} ranks of one host: "
    if name != "all_reduce":
        return Choice(backend, algorithm, f"{reason}the only algorithm of {name}", estimate_us)
    limit = one_shot_bytes(transport.size, settings.slot_bytes)
    facts = {
        "one_shot": f"every rank reads all of it: taken up to {limit} bytes",
        "two_shot": f"each rank adds a part, then all fetch the rest: taken above {limit} bytes",
        "symmetric": f"needs a tensor of empty() on every rank, of more than {SYMMETRIC_BYTES} "
        "bytes",
    }
    if rule is not None and rule.algorithm == algorithm:
        asked = f"{settings.algorithms_from} has {rule}"
        rejected = {other: asked for other in facts if other != algorithm}
        return Choice(backend, algorithm, f"{reason}{asked}", estimate_us, rejected)
    reason += facts[algorithm]
    if rule is not None and rule.algorithm != NATIVE:
        reason += f" ({settings.algorithms_from} has {rule}, for symmetric tensors)"
    rejected = {other: why for other, why in facts.items() if other != algorithm}
    return Choice(backend, algorithm, reason, estimate_us, rejected)
