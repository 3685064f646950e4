"""Checks of the group itself: identity, order, sub-groups, hooks, statistics, failure."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sagellm.core.protocols.backend_spec import Capabilities
from sagellm.core.protocols.comm_types import Choice, CommCall
from sagellm.core.protocols.errors import CommError, CommTimeoutError, ConfigError
from sagellm.core.protocols.work import CompletedWork, Work

from .contract import Check, Skipped
from .ranks import Ranks, expect_equal, expect_raises, reduced, require, values

__all__ = ["checks"]

_SHORT_S = 1.5  # the group's deadline where a check waits for it
_BOUND_S = 8.0  # what a deadline may take beyond itself on a busy machine


def _sum_of(r: Ranks, n: int, salt: int = 0) -> NDArray[Any]:  # Any: integers or floats
    return reduced("sum", [values(k, n, salt) for k in range(r.size)], "float32")


def _identity(r: Ranks) -> None:
    b = r.backend
    require(b.name, "name is empty")
    require((b.rank, b.size) == (r.rank, r.size), f"says rank {b.rank} of {b.size}")
    require(len(b.global_ranks) == r.size == len(set(b.global_ranks)), f"{b.global_ranks}")
    require(b.device_type, "device_type is empty")
    require(isinstance(b.capabilities, Capabilities), f"capabilities are {b.capabilities!r}")
    require("all_reduce" in b.capabilities.ops, "capabilities.ops has no all_reduce")


def _order(r: Ranks) -> None:
    """Many works in flight at once; each gets the operands of its own call."""
    works: list[tuple[int, Work[torch.Tensor]]] = []
    for i in range(30):
        work = r.backend.all_reduce(r.mine(5 + i, salt=i), async_op=True)
        assert isinstance(work, Work)
        works.append((i, work))
    for i, work in reversed(works):
        expect_equal(work.wait(r.timeout_s), _sum_of(r, 5 + i, i), f"work {i}")


def _handle(r: Ranks) -> None:
    x = r.mine(9)
    work = r.backend.all_reduce(x, async_op=True)
    assert isinstance(work, Work)
    gets: list[tuple[str, Callable[[], object]]] = [
        ("wait", lambda: work.wait(r.timeout_s)),
        ("wait again", lambda: work.wait(0)),
        ("synchronize", lambda: work.synchronize(r.timeout_s)),
        ("result", work.result),
    ]
    for name, get in gets:
        if get() is not x:
            raise AssertionError(f"{name} does not give the tensor that was reduced")
    require(work.done(), "done is False after wait")
    require(work.exception() is None, f"exception is {work.exception()!r} after success")
    expect_equal(_future_of(work).wait(), _sum_of(r, 9), "get_future")

    async def awaited() -> torch.Tensor:
        second = r.backend.all_reduce(r.mine(9), async_op=True)
        assert isinstance(second, Work)
        return await asyncio.wait_for(_as_coroutine(second), r.timeout_s)

    expect_equal(asyncio.run(awaited()), _sum_of(r, 9), "await")


def _future_of(work: object) -> Any:  # noqa: ANN401 - torch's futures have no types
    found: Any = work
    return found.get_future()


async def _as_coroutine(work: Work[torch.Tensor]) -> torch.Tensor:
    return await work


def _poll(r: Ranks) -> None:
    """A wait of 0 seconds on work in flight raises, and the work goes on."""
    if r.device != "cpu":
        raise Skipped("a wait on a device orders streams and returns")
    if r.rank == 0:
        work = r.backend.all_reduce(r.mine(4), async_op=True)
        assert isinstance(work, Work)
        early = work.done()
        error = None if early else expect_raises(CommTimeoutError, "wait(0)", lambda: work.wait(0))
        r.signal("polled")
        expect_equal(work.wait(r.timeout_s), _sum_of(r, 4), "after a poll")
        require(not early, "the work was done before the other ranks had come")
        assert error is not None
    else:
        r.await_signal("polled", [0])
        r.backend.all_reduce(r.mine(4))


def _barrier(r: Ranks) -> None:
    """Nobody leaves before everybody has come."""
    for i in range(5):
        r.signal(f"in{i}")
        r.attempt("barrier", call=lambda: r.backend.barrier())
        r.await_signal(f"in{i}", range(r.size), timeout_s=0)
    work = r.backend.barrier(async_op=True)
    assert isinstance(work, Work), f"barrier(async_op=True) gave {work!r}"
    work.wait(r.timeout_s)


def _barrier_timeout(r: Ranks) -> None:
    """A barrier that is short of ranks ends at its own deadline and names them where it can."""
    if r.rank == r.size - 1:
        r.await_signal("over", range(r.size - 1), timeout_s=30)
        return
    started = time.monotonic()
    try:
        r.attempt("barrier", call=lambda: r.backend.barrier(timeout_s=0.5))
        raise AssertionError("the barrier ended although a rank never came")
    except CommTimeoutError as e:
        took = time.monotonic() - started
        require(took < 0.5 + _BOUND_S, f"the barrier's 0.5 s deadline took {took:.1f} s")
        require("barrier" in str(e), f"the error does not name the operation: {e}")
        named = re.search(rf"ranks? [^;]*\b{r.size - 1}\b", str(e))
        require(named, f"the error does not name rank {r.size - 1}: {e}")
    except CommError as e:
        # Another rank's deadline may have torn the group down first.
        require(time.monotonic() - started < 0.5 + _BOUND_S, f"late, with {e}")
        require(r.size > 2, f"the missing rank was reported as {type(e).__name__}: {e}")
    finally:
        r.signal("over")


def _deadline(r: Ranks) -> None:
    """A collective whose peer never comes ends at the group's deadline, and so do later calls."""
    if r.rank == r.size - 1:
        r.await_signal("over", range(r.size - 1), timeout_s=40)
        return
    started = time.monotonic()
    error = expect_raises(CommError, "all_reduce without a peer",
                          lambda: r.backend.all_reduce(r.mine(3)))  # fmt: skip
    took = time.monotonic() - started
    r.signal("over")
    require(took < r.timeout_s + _BOUND_S, f"a deadline of {r.timeout_s} s took {took:.1f} s")
    require(took > r.timeout_s / 2, f"a {r.timeout_s} s deadline took {took:.2f} s: {error}")
    if r.size == 2:
        require(isinstance(error, CommTimeoutError), f"{type(error).__name__}: {error}")
    require("all_reduce" in str(error), f"the error does not name the operation: {error}")
    started = time.monotonic()
    expect_raises(CommError, "a call on a dead group", lambda: r.backend.all_reduce(r.mine(3)))
    require(time.monotonic() - started < _BOUND_S, "a call on a dead group waited")


def _recv_deadline(r: Ranks) -> None:
    """A receive that nothing is sent to ends at the group's deadline."""
    if r.rank != 0:
        r.await_signal("over", [0], timeout_s=40)
        return
    started = time.monotonic()
    expect_raises(CommError, "recv without a send", lambda: r.backend.recv(r.mine(3), 1))
    took = time.monotonic() - started
    r.signal("over")
    require(took < r.timeout_s + _BOUND_S, f"a deadline of {r.timeout_s} s took {took:.1f} s")


def _abort(r: Ranks) -> None:
    """`abort` from another thread ends a wait long before its deadline."""
    if r.rank != 0:
        r.await_signal("over", [0], timeout_s=40)
        return
    ended: list[BaseException | float] = []
    waiting = threading.Event()

    def wait() -> None:
        work = r.backend.recv(r.mine(3), 1, async_op=True)
        assert isinstance(work, Work)
        waiting.set()
        try:
            work.wait(r.timeout_s)
        except CommError as e:
            ended.append(e)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    try:
        require(waiting.wait(r.timeout_s), "recv with async_op=True did not return")
        started = time.monotonic()
        r.backend.abort("the contract asks for it")
        r.backend.abort("once more")
        thread.join(r.timeout_s + _BOUND_S)
        took = time.monotonic() - started
        require(not thread.is_alive(), "abort left a waiter waiting")
        require(ended, "the wait ended without an error")
        require(took < _BOUND_S, f"abort took {took:.1f} s to end a wait")
        error = expect_raises(CommError, "a call after abort",
                              lambda: r.backend.all_reduce(r.mine(3)))  # fmt: skip
        require(str(error), "the error after abort has no text")
    finally:
        r.signal("over")


def _close(r: Ranks) -> None:
    x = r.mine(3)
    r.backend.all_reduce(x)
    r.meet_all("before")
    r.backend.close()
    r.backend.close()
    expect_raises(CommError, "a call after close", lambda: r.backend.all_reduce(r.mine(3)))
    r.meet_all("after")


def _split(r: Ranks) -> None:
    """Even, odd and all ranks, each in falling order; the parent goes on beside them."""
    b = r.backend
    parts = [list(range(k, r.size, 2))[::-1] for k in range(min(2, r.size))]
    parts.append(list(range(r.size))[::-1])
    subs = [b.split(ranks, name=f"half{k}") for k, ranks in enumerate(parts)]
    for ranks, sub in zip(parts, subs, strict=True):
        if r.rank not in ranks:
            require(sub is None, f"split({ranks}) gave a group to rank {r.rank}")
            continue
        if sub is None:
            raise AssertionError(f"split({ranks}) gave no group to rank {r.rank}")
        require((sub.rank, sub.size) == (ranks.index(r.rank), len(ranks)), f"{sub.rank}/{sub.size}")
        require(sub.global_ranks == tuple(b.global_ranks[k] for k in ranks), f"{sub.global_ranks}")
        x = r.mine(6)
        sub.all_reduce(x)
        expect_equal(x, reduced("sum", [values(k, 6) for k in ranks], "float32"), f"in {ranks}")
        y = r.mine(6)
        sub.broadcast(y, 0)
        expect_equal(y, values(ranks[0], 6), f"broadcast from rank 0 of {ranks}")
    z = r.mine(6)
    b.all_reduce(z)
    expect_equal(z, _sum_of(r, 6), "the parent after split")
    r.meet_all("split done")
    for sub in subs:
        if sub is not None:
            sub.close()


def _split_arguments(r: Ranks) -> None:
    for what, ranks in (("a rank twice", [0, 0]), ("a rank outside", [0, r.size])):
        expect_raises(ConfigError, f"split with {what}", lambda ranks=ranks: r.backend.split(ranks))  # type: ignore[misc]  # default binds ranks


def _alone(r: Ranks) -> None:
    """In a group of one every operation is the identity."""
    subs = [r.backend.split([k]) for k in range(r.size)]
    sub = subs[r.rank]
    if sub is None:
        raise AssertionError("split([own rank]) gave no group")
    foreign = [k for k, s in enumerate(subs) if k != r.rank and s is not None]
    require(not foreign, f"rank {r.rank} was given the groups of {foreign}")
    require((sub.rank, sub.size) == (0, 1), f"rank {sub.rank} of {sub.size}")
    x, own = r.mine(4), values(r.rank, 4)
    sub.all_reduce(x)
    expect_equal(x, own, "all_reduce alone")
    expect_equal(sub.all_gather_into_tensor(torch.zeros_like(x), x), own, "all_gather alone")
    expect_equal(sub.reduce_scatter([x]), own, "reduce_scatter alone")
    expect_equal(sub.all_to_all([x])[0], own, "all_to_all alone")  # type: ignore[index]  # a list
    expect_equal(sub.all_to_all_single(torch.zeros_like(x), x), own, "all_to_all_single alone")
    expect_equal(sub.broadcast(x, 0), own, "broadcast alone")
    expect_equal(sub.reduce(x, 0), own, "reduce alone")
    expect_equal(sub.gather(x, 0)[0], own, "gather alone")  # type: ignore[index]  # a list
    expect_equal(sub.scatter(torch.zeros_like(x), [x], 0), own, "scatter alone")
    sub.barrier()
    r.meet_all("alone done")


def _coalesce(r: Ranks) -> None:
    xs = [r.mine(4, salt=i) for i in range(4)]
    with r.backend.coalesce():
        for x in xs:
            r.backend.all_reduce(x)
    for i, x in enumerate(xs):
        expect_equal(x, _sum_of(r, 4, i), f"call {i} within coalesce")


def _memory(r: Ranks) -> None:
    x = r.backend.empty((3, 5), torch.float32)
    require(tuple(x.shape) == (3, 5), f"empty gave shape {tuple(x.shape)}")
    require(x.dtype == torch.float32, f"empty gave {x.dtype}")
    require(x.device.type == r.device, f"empty gave a tensor on {x.device}")
    registration = r.backend.register(x)
    x.copy_(r.mine((3, 5)))
    r.backend.all_reduce(x)
    inputs = [values(k, (3, 5)) for k in range(r.size)]
    expect_equal(x, reduced("sum", inputs, "float32"), "all_reduce of registered memory")
    registration.release()


def _explain(r: Ranks) -> None:
    choices = [r.backend.explain("all_reduce", n) for n in (8, 1 << 20, 8)]
    for choice in choices:
        require(isinstance(choice, Choice), f"explain gave a {type(choice).__name__}")
        require(choice.backend and choice.algorithm and choice.reason, f"vague: {choice}")
    require(choices[0] == choices[2], "explain is not pure")
    text = f"{choices[0]}|{choices[1]}".encode()
    length = torch.tensor([len(text), sum(text)], dtype=torch.int64, device=r.device)
    for k, other in enumerate(r.backend.all_gather(length)):  # type: ignore[arg-type]  # a list
        require(other.tolist() == length.tolist(), f"explain differs between this rank and {k}")


def _stats(r: Ranks) -> None:
    def all_reduces() -> tuple[int, int, int, int]:
        ops = r.backend.get_stats().ops
        s = ops.get("all_reduce")
        return (s.calls, s.bytes, s.copies, s.errors) if s is not None else (0, 0, 0, 0)

    before = all_reduces()
    for _ in range(3):
        r.backend.all_reduce(r.mine(16))
    r.backend.all_reduce(r.mine((4, 4)).t())
    after = all_reduces()
    stats = r.backend.get_stats()
    require((stats.rank, stats.size) == (r.rank, r.size), f"statistics of rank {stats.rank}")
    require(stats.backend == r.backend.name, f"statistics of backend {stats.backend!r}")
    require(after[0] - before[0] == 4, f"{after[0] - before[0]} calls were counted of 4")
    require(after[1] - before[1] == 4 * 64, f"{after[1] - before[1]} bytes were counted of 256")
    require(after[2] > before[2], "the copy of a non-contiguous input was not counted")
    require(after[3] == before[3], "an error was counted")
    require(stats.ops["all_reduce"].seconds > 0, "no time was counted")
    require(stats.in_flight == 0, f"{stats.in_flight} works are said to be in flight")
    speed = r.backend.get_bandwidth_stats().algbw_bytes_per_s.get("all_reduce", 0)
    require(speed > 0, f"bandwidth of all_reduce is {speed}")


def _hooks(r: Ranks) -> None:
    log: list[tuple[str, str, int]] = []

    def before(call: CommCall) -> None:
        log.append(("before", call.op, call.nbytes))

    def after(call: CommCall, seconds: float, error: BaseException | None) -> None:
        require(seconds >= 0 and error is None, f"after({seconds}, {error!r})")
        log.append(("after", call.op, call.nbytes))

    remove = r.backend.add_hook(before=before, after=after)
    r.backend.all_reduce(r.mine(8))
    work = r.backend.broadcast(r.mine(2), 0, async_op=True)
    assert isinstance(work, Work)
    work.wait(r.timeout_s)
    wanted = [("before", "all_reduce", 32), ("after", "all_reduce", 32),
              ("before", "broadcast", 8), ("after", "broadcast", 8)]  # fmt: skip
    require(log == wanted, f"hooks saw {log}")
    remove()
    r.backend.all_reduce(r.mine(8))
    require(log == wanted, "a removed hook was called")


def _take_over(r: Ranks) -> None:
    """A hook stands in for one call on every rank, and declines the next."""

    def take_over(call: CommCall) -> Work[torch.Tensor] | None:
        if call.nbytes != 8:
            return None
        call.tensors[0].fill_(77)
        return CompletedWork(call.tensors[0])

    remove = r.backend.add_hook(take_over=take_over)
    x, y = r.mine(2), r.mine(3)
    r.backend.all_reduce(x)
    r.backend.all_reduce(y)
    remove()
    expect_equal(x, np.full(2, 77), "a call that a hook took over")
    expect_equal(y, _sum_of(r, 3), "a call that the hook declined")


class HookError(Exception):
    """What the hook of the next check raises."""


def _hook_error(r: Ranks) -> None:
    """An exception in one rank's hook reaches its caller, and no peer waits for that rank."""

    def before(call: CommCall) -> None:
        raise HookError("on purpose")

    if r.rank == 0:
        r.backend.add_hook(before=before)
        error = expect_raises(Exception, "a raising hook", lambda: r.backend.all_reduce(r.mine(3)))
        r.signal("raised")
        chain = [error, error.__cause__, error.__context__]
        require(any(isinstance(e, HookError) for e in chain), f"the caller got {error!r} instead")
        expect_raises(CommError, "a call afterwards", lambda: r.backend.all_reduce(r.mine(3)))
        r.await_signal("over", r.others, timeout_s=r.timeout_s + _BOUND_S)
    else:
        r.await_signal("raised", [0])
        started = time.monotonic()
        expect_raises(CommError, "a call whose peer aborted",
                      lambda: r.backend.all_reduce(r.mine(3)))  # fmt: skip
        took = time.monotonic() - started
        r.signal("over")
        require(took < _BOUND_S, f"a call whose peer had aborted waited {took:.1f} s")


def checks() -> list[Check]:
    """The group's checks, in a stable order."""
    plain: list[tuple[str, Callable[[Ranks], None], int]] = [
        ("says who it is", _identity, 1),
        ("many works in flight keep their order", _order, 1),
        ("the handle of a work", _handle, 1),
        ("a poll does not end the work", _poll, 2),
        ("barrier", _barrier, 1),
        ("sub-groups by split", _split, 2),
        ("split refuses bad ranks", _split_arguments, 1),
        ("a group of one", _alone, 1),
        ("coalesce", _coalesce, 1),
        ("memory", _memory, 1),
        ("explain", _explain, 1),
        ("statistics are counted", _stats, 1),
        ("hooks see every call", _hooks, 1),
        ("a hook takes over", _take_over, 1),
        ("close may be repeated", _close, 1),
    ]
    deadly: list[tuple[str, Callable[[Ranks], None], float | None]] = [
        ("a barrier's deadline names the missing rank", _barrier_timeout, None),
        ("a peer that never comes", _deadline, _SHORT_S),
        ("a message that never comes", _recv_deadline, _SHORT_S),
        ("abort wakes waiters", _abort, None),
        ("an exception in a hook", _hook_error, None),
    ]
    found = [Check(name, run, min_size=size) for name, run, size in plain]
    found += [
        Check(name, run, min_size=2, deadly=True, deadline_s=deadline)
        for name, run, deadline in deadly
    ]
    return found
