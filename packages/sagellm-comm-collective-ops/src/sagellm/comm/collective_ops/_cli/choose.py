"""`explain`: what would run for one call, and why, as the ranks themselves say it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from sagellm.comm.collective_ops.factory import explain_selection
from sagellm.core.protocols import CommError

from .launch import Meeting, make_backends, run_ranks

__all__ = ["run_explain"]


def run_explain(
    op: str,
    nbytes: int,
    backend: str,
    *,
    device: str,
    ranks: int | None,
    timeout_s: float,
    calibrate: bool = False,
) -> dict[str, Any] | None:  # Any: JSON
    """The answer of every rank; None but on rank 0.

    With `calibrate` the algorithms are measured first, or an earlier measurement is taken.

    Raises:
        DistributedRuntimeError: A rank failed.

    """
    found = run_ranks(
        _on_rank,
        op,
        nbytes,
        backend,
        device,
        timeout_s,
        calibrate,
        ranks=ranks,
        deadline_s=timeout_s,
        timeout_s=4 * timeout_s,
    )
    if not found:
        return None
    first: dict[str, Any] = found[0]
    first["ranks"] = len(found)
    first["agree"] = all(answer.get("choice") == first.get("choice") for answer in found)
    return first


def _on_rank(
    meeting: Meeting,
    op: str,
    nbytes: int,
    name: str,
    device: str,
    timeout_s: float,
    calibrate: bool,
) -> dict[str, Any]:
    answer: dict[str, Any] = {"op": op, "nbytes": nbytes, "asked": name}
    if name == "auto":
        answer["selection"] = explain_selection(device=device, timeout_s=timeout_s).explain()
    options = {"calibrate": True} if calibrate else None
    made, failed = make_backends(meeting, [name], device, timeout_s, options)
    if failed:
        return answer | {"error": failed[name]}
    with made[name] as backend:
        try:
            choice = backend.explain(op, nbytes)
        except CommError as e:
            answer["error"] = str(e)
        else:
            answer["choice"] = asdict(choice) | {"rejected": dict(choice.rejected)}
        meeting.gather(None)
    return answer
