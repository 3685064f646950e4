"""Which algorithm of shm runs for a call, and what speaks against the others."""

from __future__ import annotations

from sagellm.comm.collective_ops._chosen import Chooser
from sagellm.comm.collective_ops.choice import NATIVE, PRIMITIVES, expected_us
from sagellm.core.protocols import Choice

from .choice import STAGED, SYMMETRIC_BYTES
from .transport import ShmTransport

__all__ = ["explain_shm"]


def explain_shm(
    backend: str,
    transport: ShmTransport,
    chooser: Chooser | None,
    op: str,
    nbytes: int,
    estimate_us: float | None,
) -> Choice:
    """What runs for a tensor that is not symmetric.

    Args:
        backend: Its name.
        transport: The group's.
        chooser: Has what was modelled or measured.
        op: Method.
        nbytes: Bytes of one rank's input.
        estimate_us: What a cost model expects, None without one.

    """
    name = PRIMITIVES.get(op, op)
    engine, settings = transport.engine, transport.settings
    algorithm = engine.algorithm(name, nbytes)
    rule = settings.table.pick(name, nbytes)
    reason = f"the {engine.name} engine, {transport.size} ranks of one host: "
    if name != "all_reduce":
        return Choice(backend, algorithm, f"{reason}the only algorithm of {name}", estimate_us)
    limit = f"{transport.one_shot_bytes} bytes"
    times = {}
    if chooser is not None and chooser.costs is not None:
        if chooser.tables[-1].rules:
            limit += f", by {chooser.tables[-1].source}"
        costs = chooser.costs
        times = {a: expected_us(costs, name, a, transport.size, nbytes) for a in STAGED[name]}
        estimate_us = times.get(algorithm)
    facts = {
        "one_shot": f"every rank reads all of it: taken up to {limit}",
        "two_shot": f"each rank adds a part, then fetches the rest: taken above {limit}",
        "symmetric": f"needs a tensor of empty() on every rank, of more than {SYMMETRIC_BYTES} "
        "bytes",
    }
    for other, us in times.items():
        if us is not None:
            facts[other] += f"; it is expected to take {us:.1f} us"
    if rule is not None and rule.algorithm == algorithm:
        asked = f"{settings.algorithms_from} has {rule}"
        rejected = {other: asked for other in facts if other != algorithm}
        return Choice(backend, algorithm, f"{reason}{asked}", estimate_us, rejected)
    reason += facts[algorithm]
    if rule is not None and rule.algorithm != NATIVE:
        reason += f" ({settings.algorithms_from} has {rule}, for symmetric tensors)"
    rejected = {other: why for other, why in facts.items() if other != algorithm}
    return Choice(backend, algorithm, reason, estimate_us, rejected)
