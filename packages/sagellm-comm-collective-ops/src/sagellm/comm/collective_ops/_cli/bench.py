"""`bench`: a table as nccl-tests print it, for every backend beside the others."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from sagellm.core.protocols import CommBackendProtocol, CommError, ConfigError
from sagellm.core.protocols.process_group import busbw_factor

from .launch import Meeting, make_backends, run_ranks

__all__ = ["OPS", "BenchRow", "run_bench"]

OPS = (
    "all_reduce",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "broadcast",
    "all_to_all_single",
)
_WARMUP = 3
_BUDGET_S = 0.25
_MAX_CALLS = 2000


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One line of the table.

    Attributes:
        backend: Contender.
        op: Operation.
        nbytes: Size of the operation as nccl-tests count it: the larger of input and output.
        dtype: Element type.
        calls: Calls that were timed.
        time_us: Per call, of the slowest rank, the median over calls.
        p99_us: 99th percentile of the slowest rank.
        algbw_bytes_per_s: `nbytes` over the time.
        busbw_bytes_per_s: The same times nccl-tests' factor.
        wrong: Elements that were not what they should be, over all ranks.
        error: Why there is no figure; empty when there is.

    """

    backend: str
    op: str
    nbytes: int
    dtype: str
    calls: int = 0
    time_us: float = 0.0
    p99_us: float = 0.0
    algbw_bytes_per_s: float = 0.0
    busbw_bytes_per_s: float = 0.0
    wrong: int = 0
    error: str = ""


def run_bench(
    ops: list[str],
    sizes: list[int],
    backends: list[str],
    *,
    device: str,
    dtype: str,
    ranks: int | None,
    timeout_s: float,
) -> tuple[list[BenchRow], dict[str, str]]:
    """Rows in order, and the contenders that could not start; empty but on rank 0.

    Raises:
        ConfigError: An unknown operation or element type.
        DistributedRuntimeError: A rank failed.

    """
    for op in ops:
        if op not in OPS:
            raise ConfigError(f"bench has no operation {op!r}; known: {', '.join(OPS)}")
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise ConfigError(f"{dtype!r} is no element type of torch")
    found = run_ranks(
        _on_rank,
        ops,
        sizes,
        backends,
        device,
        dtype,
        timeout_s,
        ranks=ranks,
        deadline_s=timeout_s,
        timeout_s=900.0,
    )
    if not found:
        return [], {}
    rows = [BenchRow(**row) for row in found[0][0]]
    return rows, found[0][1]


def _on_rank(
    meeting: Meeting,
    ops: list[str],
    sizes: list[int],
    names: list[str],
    device: str,
    dtype: str,
    timeout_s: float,
) -> tuple[list[dict[str, object]], dict[str, str]]:
    made, failed = make_backends(meeting, names, device, timeout_s)
    rows = []
    try:
        for op in ops:
            for size in sizes:
                for name in list(made):
                    row = _measure(
                        meeting, made[name], name, op, size, getattr(torch, dtype), device
                    )
                    if row.error:
                        failed[name] = row.error
                        made.pop(name).close()
                    rows.append(asdict(row))
    finally:
        for backend in made.values():
            backend.close()
    return rows, failed


def _measure(
    meeting: Meeting,
    backend: CommBackendProtocol,
    name: str,
    op: str,
    nbytes: int,
    dtype: torch.dtype,
    device: str,
) -> BenchRow:
    text = str(dtype).removeprefix("torch.")
    call, check, size = _prepare(backend, op, nbytes, dtype, device)
    seconds: list[float] = []
    wrong, error = 0, ""
    try:
        wrong = check()
        for _ in range(_WARMUP):
            call()
        _sync(device)
        start = time.perf_counter()
        call()
        _sync(device)
        once = max(meeting.gather(time.perf_counter() - start))
        calls = max(5, min(_MAX_CALLS, int(_BUDGET_S / max(once, 1e-7))))
        for _ in range(calls):
            start = time.perf_counter()
            call()
            _sync(device)
            seconds.append(time.perf_counter() - start)
    except CommError as e:
        error = str(e)
    seconds.sort()
    middle = seconds[len(seconds) // 2] if seconds else 0.0
    late = seconds[int(len(seconds) * 0.99)] if seconds else 0.0
    answers = meeting.gather((middle, late, wrong, error))
    errors = [answer[3] for answer in answers if answer[3]]
    if errors:
        return BenchRow(name, op, size, text, error=errors[0])
    slowest = max(answer[0] for answer in answers)
    algbw = size / slowest if slowest else 0.0
    return BenchRow(
        name,
        op,
        size,
        text,
        len(seconds),
        slowest * 1e6,
        max(answer[1] for answer in answers) * 1e6,
        algbw,
        algbw * busbw_factor(op, backend.size),
        sum(answer[2] for answer in answers),
    )


def _prepare(
    backend: CommBackendProtocol, op: str, nbytes: int, dtype: torch.dtype, device: str
) -> tuple[Callable[[], object], Callable[[], int], int]:
    """The call to time, a check that counts wrong elements, and the size as it really is."""
    world = backend.size
    part = max(1, nbytes // dtype.itemsize // world)
    whole = (
        part * world
        if op != "all_reduce" and op != "broadcast"
        else max(1, nbytes // dtype.itemsize)
    )
    x = torch.full((whole,), 1, dtype=dtype, device=device)
    y = torch.full((part,), backend.rank, dtype=dtype, device=device)
    expected: Tensor

    if op == "all_reduce":
        expected = torch.full_like(x, world)

        zeros = torch.zeros_like(x)  # stays zero however often it is summed

        def call() -> object:
            return backend.all_reduce(zeros)

        def check() -> int:
            return _differ(backend.all_reduce(x.clone()), expected)

    elif op == "broadcast":

        def call() -> object:
            return backend.broadcast(x, 0)

        def check() -> int:
            z = torch.full_like(x, backend.rank)
            return _differ(backend.broadcast(z, world - 1), world - 1)

    elif op == "all_gather_into_tensor":
        expected = torch.arange(world, device=device).to(dtype).repeat_interleave(part)

        def call() -> object:
            return backend.all_gather_into_tensor(x, y)

        def check() -> int:
            return _differ(backend.all_gather_into_tensor(x, y), expected)

    elif op == "reduce_scatter_tensor":

        def call() -> object:
            return backend.reduce_scatter_tensor(y, x)

        def check() -> int:
            return _differ(backend.reduce_scatter_tensor(y, x), world)

    else:
        z = torch.empty_like(x)
        own = torch.full_like(x, backend.rank)
        expected = torch.arange(world, device=device).to(dtype).repeat_interleave(part)

        def call() -> object:
            return backend.all_to_all_single(z, own)

        def check() -> int:
            return _differ(backend.all_to_all_single(z, own), expected)

    return call, check, whole * dtype.itemsize


def _differ(got: object, expected: Tensor | int) -> int:
    assert isinstance(got, Tensor)
    return int(torch.ne(got, expected).sum())


def _sync(device: str) -> None:
    if device != "cpu":
        getattr(torch, torch.device(device).type).synchronize()
