"""Hooks around every call of a group, and what an exception in one does to the peers."""

import time

import pytest
import torch
import torch.distributed as dist

from sagellm.comm.collective_ops import register_c10d_backend, wrap_process_group
from sagellm.core.protocols import CompletedWork

INNER = ("gloo", "sagellm", "sagellm_gloo")


def fresh(groups, inner):
    """A group that a test may break, of the same library, and that all ranks have."""
    group = dist.new_group(backend=dist.get_backend(groups[inner]))
    dist.barrier()  # torch lets a rank go on while others still connect to it
    return group


def records_and_hooks(groups, inner):
    seen, records, over = [], [], []
    base = fresh(groups, inner)
    g = wrap_process_group(
        base, record=records, before=seen.append,
        after=lambda call, seconds, error: over.append((call.op, seconds > 0, error)),
    )  # fmt: skip
    x = torch.ones(4)
    dist.all_reduce(x, group=g)
    out = torch.zeros(8)
    dist.all_gather_into_tensor(out, x, group=g, async_op=True).wait()
    dist.broadcast(x, 1, group=g)
    dist.barrier(group=g)
    if g.rank() == 0:
        dist.send(x, 1, group=g)
    else:
        dist.recv(x, 0, group=g)
    assert out.tolist() == [2.0] * 8
    kinds = [(c.op, c.sequence, c.nbytes, c.dtype, c.reduce_op, c.peer) for c in seen]
    assert kinds == [
        ("all_reduce", 0, 16, "float32", "sum", None),
        ("all_gather_into_tensor", 1, 16, "float32", None, None),
        ("broadcast", 2, 16, "float32", None, 1),
        ("barrier", 3, 0, "", None, None),
        (("send", "recv")[g.rank()], 4, 16, "float32", None, 1 - g.rank()),
    ]
    assert over == [(op, True, None) for op, *_ in kinds]
    assert [(r.op, r.nbytes, r.shape) for r in records[:2]] == [
        ("all_reduce", 16, (4,)), ("all_gather_into_tensor", 16, (4,)),
    ]  # fmt: skip
    assert all(r.seconds > 0 and r.group == g.group_name and not r.error for r in records)
    assert dist.get_process_group_ranks(g) == [0, 1]
    dist.destroy_process_group(g)
    y = torch.ones(1)
    dist.all_reduce(y, group=base)
    assert y.item() == 2.0
    dist.destroy_process_group(base)


@pytest.mark.parametrize("inner", INNER)
def test_hooks_see_every_call_and_its_end(c10d_worlds, inner):
    c10d_worlds(2).run(records_and_hooks, inner)


def everything_through_a_wrapper(groups):
    import torch.distributed._functional_collectives as fc

    records = []
    g = wrap_process_group(fresh(groups, "sagellm"), record=records, name="wrapped-once")
    same = fc.all_reduce(torch.ones(3), "sum", g)
    assert same.tolist() == [2.0] * 3
    net = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2), process_group=g)
    net(torch.ones(1, 2)).sum().backward()
    objects = [None, None]
    dist.all_gather_object(objects, g.rank(), group=g)
    assert objects == [0, 1]
    ops = {r.op for r in records}
    assert {"all_reduce", "broadcast", "all_gather"} <= ops, ops


def test_a_wrapped_group_stands_wherever_a_group_does(c10d_worlds):
    c10d_worlds(2).run(everything_through_a_wrapper)


def taken_over(groups, inner):
    base = fresh(groups, inner)

    def half_precision(call):
        if call.op != "all_reduce" or call.tensors[0].dtype is not torch.float32:
            return None
        x = call.tensors[0]
        wire = x.half()
        dist.all_reduce(wire, group=base)
        x.copy_(wire)
        return CompletedWork(x)

    g = wrap_process_group(base, take_over=half_precision)
    x = torch.full((2,), 1.0 + 2**-12)
    dist.all_reduce(x, group=g)
    y = torch.full((2,), 1.0 + 2**-12, dtype=torch.float64)
    dist.all_reduce(y, group=g)
    z = torch.full((2,), 1.0 + 2**-12)
    assert dist.all_reduce(z, group=g, async_op=True).get_future().wait()[0].tolist() == [2.0] * 2
    return x.tolist(), y[0].item() > 2


@pytest.mark.parametrize("inner", INNER)
def test_a_hook_may_do_a_call_itself(c10d_worlds, inner):
    assert c10d_worlds(2).run(taken_over, inner) == [([2.0, 2.0], True)] * 2


# -- a hook that raises ---------------------------------------------------------------------


def raising(groups, inner, phase):
    """What this rank's two calls gave, and how long they took."""

    def fail(*args):
        raise KeyError("a hook's own error")

    base = fresh(groups, inner)
    g = wrap_process_group(base, **({phase: fail} if base.rank() == 0 else {"record": []}))
    start, found = time.monotonic(), []
    for _ in range(2):
        x = torch.ones(4)
        try:
            dist.all_reduce(x, group=g)
        except Exception as e:
            found.append(type(e).__name__)
        else:
            found.append(x.tolist())
    return found, time.monotonic() - start


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("phase", ["before", "take_over", "after"])
def test_an_exception_in_a_hook_reaches_the_caller_and_hangs_no_peer(c10d_worlds, inner, phase):
    (ours, ours_s), (peers, peers_s) = c10d_worlds(2).run(raising, inner, phase)

    assert ours == ["KeyError", "DistributedRuntimeError"]
    assert isinstance(peers[1], str)
    assert isinstance(peers[0], str) or (phase == "after" and peers[0] == [2.0] * 4)
    assert max(ours_s, peers_s) < 10  # the groups' own deadline is 20 s


# -- a name whose groups are wrapped --------------------------------------------------------

_records = []


def registered_with_hooks(groups, name, backend):
    _records.clear()
    register_c10d_backend(name, backend=backend, record=_records)
    g = dist.new_group(backend=name)
    x = torch.ones(3)
    dist.all_reduce(x, group=g)
    assert x.tolist() == [2.0] * 3
    found = [(r.op, r.shape, r.group == g.group_name) for r in _records], dist.get_backend(g)
    dist.destroy_process_group(g)
    return found


@pytest.mark.parametrize("backend", ["auto", "gloo", "torch:gloo"])
def test_a_name_may_stand_for_groups_with_hooks(c10d_worlds, backend):
    name = f"recorded_{backend.replace(':', '_')}"

    found = c10d_worlds(2).run(registered_with_hooks, name, backend)

    assert found == [([("all_reduce", (3,), True)], name)] * 2
