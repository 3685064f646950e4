"""What the ranks of a pool can be asked to do. Results are JSON."""

import os

import torch
import torch.distributed as dist

from sagellm.comm.domestic import create_domestic_backend
from sagellm.core.protocols import CommError, P2POp


class State:
    """One rank's vendor, and the backend over all ranks once somebody asked for it."""

    def __init__(self, vendor):
        self.vendor = vendor
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._backend = None

    @property
    def backend(self):
        if self._backend is None:
            self._backend = create_domestic_backend(self.vendor, timeout_s=20)
        return self._backend

    def tensor(self, values, dtype=torch.float32):
        return torch.tensor(values, dtype=dtype).to(self.backend.device)

    def close(self):
        if self._backend is not None:
            self._backend.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def refusal(call):
    try:
        call()
    except CommError as e:
        return [type(e).__name__, str(e)]
    return None


def describe(state):
    b = state.backend
    return {
        "name": b.name,
        "vendor": b.vendor,
        "library": b.library,
        "device": str(b.device),
        "class": type(b).__name__,
        "size": b.size,
        "world": dist.get_backend_config(dist.group.WORLD),
        "verified": b.capabilities.verified_on_hardware,
    }


def all_reduce(state, op="sum", dtype="float32", asynchronous=False):
    x = state.tensor([state.rank + 1, 2 * state.rank + 1], getattr(torch, dtype))
    where = x.device.type
    out = state.backend.all_reduce(x, op, async_op=asynchronous)
    if asynchronous:
        out = out.wait()
    assert out is x
    return {"values": x.cpu().tolist(), "device": where, "dtype": str(x.dtype)}


def lowered_calls(state):
    return {op: s.lowered for op, s in state.backend.get_stats().ops.items()}


def library_calls(state):
    group = state.backend.library_group
    calls, group.calls = group.calls, []
    return calls


def self_test(state):
    return state.backend.self_test()


def broken_self_test(state):
    """A library that reports success and does nothing, as one driver did."""
    from torch._C import _distributed_c10d as c10d

    class Nothing(c10d.Work):
        def wait(self, timeout=None):
            return True

        def is_completed(self):
            return True

    group = state.backend.library_group
    group.all_to_all_single = lambda *args, **named: Nothing()
    try:
        return state.backend.self_test()
    finally:
        del group.all_to_all_single


def refused(state, op="sum", dtype="float32", method="all_reduce"):
    x = torch.ones(2, dtype=getattr(torch, dtype)).to(state.backend.device)
    calls = {
        "all_reduce": lambda: state.backend.all_reduce(x, op),
        "broadcast": lambda: state.backend.broadcast(x, 0),
    }
    return refusal(calls[method])


def refused_cpu_tensor(state):
    return refusal(lambda: state.backend.all_reduce(torch.ones(2)))


def kv_blocks(state):
    blocks = [state.tensor([[1.0, 2.0], [3.0, 4.0]]), state.tensor([5, 6], torch.int32)]
    if state.rank == 0:
        state.backend.send_kv_blocks(blocks, 1)
        return None
    got = state.backend.recv_kv_blocks(0)
    return [[str(b.tensor.device), str(b.tensor.dtype), b.tensor.cpu().tolist()] for b in got]


def ring(state):
    peer, source = (state.rank + 1) % state.size, (state.rank - 1) % state.size
    got = state.tensor([0.0])
    ops = [P2POp("send", state.tensor([float(state.rank)]), peer), P2POp("recv", got, source)]
    for work in state.backend.batch_p2p(ops):
        work.synchronize()
    return got.cpu().tolist()


def split_single(state):
    mine = None
    for rank in range(state.size):
        part = state.backend.split([rank], f"alone{rank}")
        mine = part or mine
    with mine:
        return [mine.size, mine.global_ranks[0], mine.all_reduce(state.tensor([7.0])).item()]


def split_both(state):
    with state.backend.split([0, 1], "both") as both:
        return both.all_reduce(state.tensor([state.rank + 1.0])).cpu().tolist()


def with_options(state, options):
    _ = state.backend  # torch's default group exists
    try:
        backend = create_domestic_backend(state.vendor, options=options, timeout_s=20)
    except CommError as e:
        return [type(e).__name__, str(e)]
    with backend:
        total = backend.all_reduce(state.tensor([1.0])).item()
        held = backend.library_group.options
        with backend.split([0, 1], "sub") as sub:
            sub_total = sub.all_reduce(state.tensor([1.0])).item()
            sub_held = sub.library_group.options
            return {
                "total": total,
                "sub_total": sub_total,
                "config": held.hccl_config,
                "sub_config": sub_held.hccl_config,
                "priority": held.is_high_priority_stream,
                "is_default": backend.process_group is dist.group.WORLD,
            }


def options_for_given_group(state, options):
    group = state.backend.process_group
    return refusal(lambda: create_domestic_backend(state.vendor, group=group, options=options))


def undelivered_options(state, options):
    """As a factory does that knows nothing of the vendor's options."""
    from sagellm.comm.domestic import backend_spec, find_vendor
    from sagellm.comm.domestic.specs import backend_class

    row = find_vendor(state.vendor)
    make = backend_class(row)
    group = state.backend.process_group
    return refusal(lambda: make(backend_spec(row), group, options=options))


def given_group(state):
    group = state.backend.process_group
    with create_domestic_backend(state.vendor, group=group) as backend:
        value = backend.all_reduce(state.tensor([2.0])).item()
    return [value, dist.is_initialized()]


def gloo_group_given(state):
    _ = state.backend
    group = dist.new_group(backend="gloo")
    found = refusal(lambda: create_domestic_backend(state.vendor, group=group))
    dist.destroy_process_group(group)
    return found


def auto(state):
    _ = state.backend
    with create_domestic_backend("auto") as backend:
        return [backend.name, backend.all_reduce(state.tensor([1.0])).item()]


def comm_name(state):
    return state.backend.comm_name()


def leave(state):
    """The second rank dies in the middle of the first one's call."""
    x = state.tensor([1.0])
    state.backend.barrier()
    if state.rank == 1:
        os._exit(0)
    return refusal(lambda: state.backend.all_reduce(x))


def gloo_backend(name):
    """A vendor's adapter over gloo on CPU tensors: needs nothing that is private to torch."""
    from dataclasses import replace

    from sagellm.comm.domestic import backend_spec, find_vendor
    from sagellm.comm.domestic.groups import OpenedGroup
    from sagellm.comm.domestic.specs import backend_class

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    row = find_vendor(name)
    spec = replace(backend_spec(row), device_types=("cpu",), c10d_name="gloo")
    opened = OpenedGroup(dist.group.WORLD, False, {}, "the test's")
    return backend_class(row).over(spec, opened, timeout_s=20)


def lowering_on_cpu(state, name):
    backend = gloo_backend(name)
    spec = backend.spec
    # gloo has no average to lend to a row that has one of its own.
    native = "avg" in spec.capabilities.reduce_ops
    mean = None if native else backend.all_reduce(torch.tensor([state.rank + 1.0]), "avg").item()
    found = {"avg": mean, "lowered": backend.get_stats().ops}
    found["lowered"] = {op: s.lowered for op, s in found["lowered"].items()}
    for rule in spec.lowering:
        if rule.rule == "via_int32":
            x = torch.tensor([state.rank], dtype=getattr(torch, rule.when))
            found[rule.when] = backend.all_reduce(x).tolist()
    found["band"] = refusal(lambda: backend.all_reduce(torch.ones(1, dtype=torch.int32), "band"))
    found["float64"] = refusal(lambda: backend.all_reduce(torch.ones(1, dtype=torch.float64)))
    return found


def self_test_on_cpu(state, name, broken=None):
    """The self-test over gloo, with one operation that reports success and does nothing."""
    from sagellm.comm.domestic.self_test import run_self_test

    backend = gloo_backend(name)
    if broken is not None:
        setattr(backend, broken, lambda *args, **named: args[0])
    return run_self_test(backend)


def adapter_on_cpu(state):
    backend = gloo_backend("hccl")
    with backend.split([0, 1], "both") as both:
        total = both.all_reduce(torch.ones(1)).item()
    return {
        "class": type(backend).__name__,
        "about": [backend.vendor, backend.library, backend.row.device],
        "claims": len(backend.link_claims()),
        "ratio": backend.efficiency("910C RoCE", 25e9).ratio,
        "split": [type(both).__name__, total],
    }


def adapter_that_cannot_be_made(state):
    """Options that the group does not hold, on a group that was made for the backend."""
    from sagellm.comm.domestic.groups import OpenedGroup
    from sagellm.comm.domestic.specs import backend_class

    backend = gloo_backend("hccl")
    made = OpenedGroup(dist.new_group(), True, {}, "the test's")
    dist.barrier(made.group)  # nobody closes it while another still connects
    before = len(dist.distributed_c10d._world.pg_map)
    wrong = {"hccl_buffer_size": "64"}
    said = refusal(lambda: backend_class(backend.row).over(backend.spec, made, options=wrong))
    return [said[0], before - len(dist.distributed_c10d._world.pg_map), dist.is_initialized()]


def groups_on_meta(state):
    """Groups of a row whose device is torch's `meta` and library gloo: no vendor is needed."""
    from dataclasses import replace

    from sagellm.comm.domestic import find_vendor
    from sagellm.comm.domestic.groups import group_map, open_group, split_group

    row = replace(find_vendor("hccl"), device="meta", c10d_name="gloo")
    options = {"hccl_algo": "level0:NA"}
    made = open_group(row, timeout_s=20)
    again, given = open_group(row), open_group(row, group=made.group)
    part = split_group(row, [0, 1], "both", 20, {})
    x = torch.ones(1)
    dist.all_reduce(x, group=part.group)
    other = replace(row, device="xpu", c10d_name="xccl")
    return {
        "why": [made.why, again.why, given.why, part.why],
        "owned": [made.owned, again.owned, given.owned, part.owned],
        "map": group_map(part.group),
        "sum": x.item(),
        "late": refusal(lambda: open_group(row, group=made.group, options=options)),
        "options": refusal(lambda: open_group(row, options=options)),
        "other": refusal(lambda: open_group(other, group=made.group)),
        "library": refusal(lambda: open_group(replace(row, c10d_name="nosuch"))),
    }
