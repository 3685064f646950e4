"""Random mixed calls on the shm backend, compared with gloo and with sums formed in rank order.

    python tests/fuzz_shm.py --ranks 3 --ops 50000 --engine native --seed 7

All ranks draw the same plan from the seed. A batch of calls runs back to back, on several groups at
once and with random delays, so that ranks are apart as they are in programs; only then are
results compared: all with a local computation from every rank's inputs (bit for bit, NaN for
NaN), exact ones also with gloo, and those that all ranks share by checksum between ranks.

It says every 10 s how far it is. Where no call ends for a minute, every rank's stacks are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import os
import random
import sys
import time
import zlib
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from fuzz_plan import (
    DEFAULT_SLOT,
    MOVED,
    REDUCING,
    SMALL_SLOT,
    Step,
    bits,
    draw,
    expected,
    right,
    values,
)

from sagellm.core.protocols import P2POp
from sagellm.core.protocols.testing.rank_pool import RankPool

ARENA_BYTES = 256 << 20
BATCH = 100
EPOCH = 8  # batches with the same groups
STALL_S = 60.0
TIMEOUT_S = 90.0  # of a call: longer than a stall, so that stacks are printed first
REPORT_S = 10.0
SLOTS = {  # of the first group and the second, and of those split from them
    "small": (SMALL_SLOT, SMALL_SLOT),
    "default": (DEFAULT_SLOT, DEFAULT_SLOT),
    "both": (SMALL_SLOT, DEFAULT_SLOT),
}
ALGORITHMS = (
    None,
    "all_reduce:0-3k:two_shot,all_reduce:3k-1g:one_shot",
    "all_reduce:0-1g:two_shot",
)


@dataclass
class Done:
    """A call that was started here, and what is to be checked of it."""

    step: Step
    results: list | None = field(default_factory=list)  # None: what the work gives
    works: list = field(default_factory=list)
    registrations: list = field(default_factory=list)

    def finish(self):
        for work in self.works:
            result = work.wait(TIMEOUT_S)
            call_ended()
            if self.results is None:
                self.results = as_list(result)
        for registration in self.registrations:
            registration.release()
        self.works, self.registrations = [], []


def as_list(result):
    if result is None:
        return []
    return list(result) if isinstance(result, list | tuple) else [result]


_armed = 0.0


def call_ended():
    """Start the time anew after which this process prints its stacks."""
    global _armed
    now = time.monotonic()
    if now - _armed > 1:
        faulthandler.dump_traceback_later(STALL_S, repeat=True)
        _armed = now


# -- a call -----------------------------------------------------------------------------------


def formed(step, backend, x):
    """The values in memory of the step's form."""
    if step.form == "symmetric":
        y = backend.empty(x.shape, x.dtype)
    elif step.form == "offset":
        y = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    elif step.form == "strided":
        y = torch.empty((*x.shape, 2), dtype=x.dtype)[..., 1]
    else:
        y = torch.empty(x.shape, dtype=x.dtype)
    y.copy_(x)
    return y


def start(step, backend, plain=False):
    """Make the call on this rank; `plain` for a second opinion from another backend."""
    done = Done(step)
    op, shape, size, rank = step.op, step.shape, backend.size, backend.rank
    later = {"async_op": step.style == "async" and not plain}

    def put(x):
        x = x.clone() if plain else formed(step, backend, x)
        if step.style == "registered" and not plain and x.is_contiguous():
            done.registrations.append(backend.register(x))
        return x

    def room(*shape):
        return put(torch.zeros(shape, dtype=step.dtype))

    def keep(result, *results):
        if later["async_op"] and result is not None:
            done.works.append(result)
            done.results = list(results) or None
        else:
            done.results = list(results) or as_list(result)

    if op == "barrier":
        keep(backend.barrier(**later))
        done.results = []
    elif op == "all_reduce":
        x = put(values(step, rank, shape))
        if step.style == "registered" and not plain:
            saved = x.clone()
            backend.all_reduce(x, step.reduction)
            x.copy_(saved)
        keep(backend.all_reduce(x, step.reduction, **later), x)
    elif op == "reduce":
        x = put(values(step, rank, shape))
        keep(backend.reduce(x, step.root, step.reduction, **later), x)
        if rank != step.root:
            done.results = []
    elif op == "reduce_scatter_tensor":
        out, x = room(*shape), put(values(step, rank, (size, *shape)))
        keep(backend.reduce_scatter_tensor(out, x, step.reduction, **later), out)
    elif op == "reduce_scatter":
        xs = [put(x) for x in values(step, rank, (size, *shape))]
        keep(backend.reduce_scatter(xs, step.reduction, **later))
    elif op == "all_gather_into_tensor":
        out, x = room(size, *shape), put(values(step, rank, shape))
        keep(backend.all_gather_into_tensor(out, x, **later), out)
    elif op == "all_gather":
        keep(backend.all_gather(put(values(step, rank, shape)), **later))
    elif op == "gather":
        keep(backend.gather(put(values(step, rank, shape)), step.root, **later))
    elif op == "broadcast":
        x = put(values(step, rank, shape))
        keep(backend.broadcast(x, step.root, **later), x)
    elif op == "scatter":
        out = room(*shape)
        xs = [put(x) for x in values(step, rank, (size, *shape))] if rank == step.root else None
        keep(backend.scatter(out, xs, step.root, **later), out)
    elif op == "all_to_all_single":
        out, x = room(size, *shape), put(values(step, rank, (size, *shape)))
        keep(backend.all_to_all_single(out, x, **later), out)
    elif op == "uneven":
        splits = step.splits(size)
        takes = [splits[r][rank] for r in range(size)]
        out = room(sum(takes), *shape[1:])
        x = put(values(step, rank, (sum(splits[rank]), *shape[1:])))
        keep(backend.all_to_all_single(out, x, takes, splits[rank], **later), out)
    elif op == "all_to_all":
        xs = [put(values(step, rank, shape, f"to{r}")) for r in range(size)]
        keep(backend.all_to_all(xs, **later))
    elif rank == step.root:
        send(step, backend, put(values(step, rank, shape)), done, later)
    elif rank == step.peer:
        x = room(*shape)
        if op == "batch_p2p":
            kinds = [P2POp("recv", x, step.root, step.tag)]
            done.works.extend(backend.batch_p2p(kinds))
        else:
            keep(backend.recv(x, step.root, tag=step.tag, **later), x)
        done.results = [x]
    call_ended()
    return done


def send(step, backend, x, done, later):
    if step.op == "batch_p2p":
        done.works.extend(backend.batch_p2p([P2POp("send", x, step.peer, step.tag)]))
    else:
        work = backend.send(x, step.peer, tag=step.tag, **later)
        if later["async_op"]:
            done.works.append(work)


# -- a rank ---------------------------------------------------------------------------------


def delay(rng):
    """Mostly none; sometimes a moment, rarely long enough that peers stop spinning."""
    kind = rng.random()
    if kind < 0.03:
        time.sleep(rng.random() * 2e-3)
    elif kind < 0.2:
        for _ in range(rng.randint(1, 2000)):
            pass
    elif kind < 0.25:
        os.sched_yield()


class Groups:
    """The groups of an epoch: shm backends, None where this rank is no member; gloo beside."""

    def __init__(self, world, second, slots, gloo, epoch, seed):
        rng = random.Random(f"{seed}/{epoch}/groups")
        size = world.size
        ranks = rng.sample(range(size), size)
        cut = rng.randint(1, size)
        self.members = [list(range(size)), list(range(size)), ranks[:cut]]
        self.shm = [world, second, world.split(ranks[:cut])]
        self.slots = [*slots, slots[0]]
        if cut < size:
            self.members.append(ranks[cut:])
            self.shm.append(second.split(ranks[cut:]))
            self.slots.append(slots[1])
        self.gloo = [gloo if m == list(range(size)) else None for m in self.members]
        self.sizes = [len(m) for m in self.members]

    def close(self):
        for backend in self.shm[2:]:
            if backend is not None:
                backend.close()


def exact(step):
    """Whether gloo gives the same bits."""
    if step.op not in REDUCING:
        return step.dtype not in MOVED
    chosen = step.reduction in ("min", "max") and not step.special
    return chosen or not step.dtype.is_floating_point


def run_rank(rank, size, ops, engine, seed, slots="both", p2p=True, report=False):
    """Fuzz on this rank, whose default group is gloo; returns counts by operation."""
    from sagellm.comm.collective_ops import GlooBackend
    from sagellm.comm.collective_ops.shm_backend import ShmBackend

    torch.set_num_threads(1)
    gloo = GlooBackend(timeout_s=TIMEOUT_S)
    first, other = SLOTS[slots]
    options = {
        "engine": engine,
        "slot_bytes": first,
        "arena_bytes": ARENA_BYTES,
        "algorithms": ALGORITHMS[seed % len(ALGORITHMS)],
    }
    world = ShmBackend(timeout_s=TIMEOUT_S, options=options)
    options |= {"algorithms": None, "slot_bytes": other}
    second = ShmBackend(timeout_s=TIMEOUT_S, options=options)
    assert engine in ("auto", world.engine), f"{world.engine} runs instead of {engine}"
    counts, number, batch = {}, 0, 0
    groups = None
    apart = random.Random(f"{seed}/{rank}/delays")
    started = told = time.monotonic()
    call_ended()
    try:
        while number < ops:
            if batch % EPOCH == 0:
                if groups is not None:
                    groups.close()
                groups = Groups(world, second, (first, other), gloo, batch // EPOCH, seed)
            rng = random.Random(f"{seed}/{batch}")
            steps = [draw(rng, number + i, groups.sizes, groups.slots, p2p) for i in range(BATCH)]
            run_batch(rank, steps, groups, apart, rng)
            for step in steps:
                counts[step.op] = counts.get(step.op, 0) + 1
            number, batch = number + BATCH, batch + 1
            now = time.monotonic()
            if report and rank == 0 and now - told > REPORT_S:
                told, speed = now, number / (now - started)
                print(f"{now - started:.0f} s: {number} calls, {speed:.0f} a second", flush=True)
    finally:
        faulthandler.cancel_dump_traceback_later()
        if groups is not None:
            groups.close()
        world.close()
        second.close()
    return counts


def run_batch(rank, steps, groups, apart, rng):
    calls = []
    for step in steps:
        backend = groups.shm[step.group]
        settle = rng.random() < 0.15  # all ranks draw, so that they stay alike
        if backend is not None:
            delay(apart)
            calls.append(start(step, backend))
        if settle:
            for call in calls:
                call.finish()
    for call in calls:
        call.finish()
    checks = torch.zeros(len(steps), dtype=torch.int64)
    for call in calls:
        step = call.step
        me = groups.members[step.group].index(rank)
        where = f"rank {rank} as {me} of {groups.members[step.group]}: {step}"
        wanted = expected(step, me, groups.sizes[step.group])
        assert len(call.results) == len(wanted), where
        for got, want in zip(call.results, wanted, strict=True):
            assert right(step, got, want, me, groups.sizes[step.group]), (
                f"{where}\ngot {got}\nwant {want}"
            )
        if step.op in ("all_reduce", "broadcast", "all_gather", "all_gather_into_tensor"):
            checks[step.number - steps[0].number] = sum(
                zlib.crc32(bits(x).numpy()) for x in call.results
            )
    compare_checksums(steps, groups, checks)
    compare_with_gloo(calls, groups)


def compare_checksums(steps, groups, checks):
    everyone = groups.gloo[0].all_gather(checks)
    for i, step in enumerate(steps):
        found = {int(everyone[r][i]) for r in groups.members[step.group]}
        assert len(found) == 1, f"ranks have different bits: {step}"


def compare_with_gloo(calls, groups):
    for call in calls:
        step, gloo = call.step, groups.gloo[call.step.group]
        if gloo is None or not exact(step) or step.op == "batch_p2p":
            continue
        theirs = start(step, gloo, plain=True)
        theirs.finish()
        for got, want in zip(call.results, theirs.results, strict=True):
            assert right(step, got, want, gloo.rank, gloo.size), (
                f"unlike gloo: {step}\ngot {got}\ngloo {want}"
            )


# -- a program ------------------------------------------------------------------------------


def rank_of_program(rank, size, store, *plan):
    from datetime import timedelta

    if not dist.is_initialized():
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=120),
        )
    return run_rank(rank, size, *plan, report=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--ops", type=int, default=50000)
    parser.add_argument("--engine", default="auto", choices=("auto", "native", "python"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slots", default="both", choices=SLOTS, help="both: group by group")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for all of it")
    parser.add_argument("--no-p2p", action="store_true", help="leave out send and receive")
    args = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    started = time.monotonic()
    with RankPool(args.ranks) as pool, contextlib.suppress(KeyboardInterrupt):
        counts = pool.run(
            rank_of_program, pool.store_path(), args.ops, args.engine, args.seed, args.slots,
            not args.no_p2p, timeout_s=args.timeout,
        )[0]  # fmt: skip
        took = time.monotonic() - started
        print(
            f"{sum(counts.values())} calls agree on {args.ranks} ranks, {args.engine}, "
            f"{args.slots} slots, seed {args.seed}, {took:.0f} s: {counts}"
        )
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
