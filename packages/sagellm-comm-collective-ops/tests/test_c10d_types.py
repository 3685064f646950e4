"""Every element type goes through a group of ours, whether or not a library knows it."""

import pytest
import torch
import torch.distributed as dist

HOSTS = [[0, 2], [1, 3]]
MOVED = [
    "uint16", "uint32", "uint64", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2",
]  # fmt: skip
WORLDS = [(2, None, "sagellm"), (2, None, "sagellm_gloo"), (4, HOSTS, "sagellm")]


def bits_of(rank, shape, dtype):
    """A tensor of any type, of bits that only this rank has."""
    x = torch.empty(shape, dtype=dtype)
    made = torch.Generator().manual_seed(100 + rank)
    codes = torch.randint(0, 256, (x.nbytes,), dtype=torch.uint8, generator=made)
    return codes.view(dtype).view(shape)


def equal(got, wanted):
    assert got.dtype is wanted.dtype
    assert got.shape == wanted.shape
    raw = [torch.frombuffer(bytearray(x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()),
                            dtype=torch.uint8) for x in (got, wanted)]  # fmt: skip
    assert torch.equal(*raw)


def moved(groups, ours, name):
    g, dtype = groups[ours], getattr(torch, name)
    size, rank = dist.get_world_size(g), dist.get_rank(g)
    everyone = [bits_of(r, (6,), dtype) for r in range(size)]

    def empty(*shape):
        return torch.empty(shape, dtype=dtype)

    outs = [empty(6) for _ in range(size)]
    dist.all_gather(outs, everyone[rank], group=g)
    for got, wanted in zip(outs, everyone, strict=True):
        equal(got, wanted)
    outs = [empty(r + 1) for r in range(size)]
    dist.all_gather(outs, bits_of(rank, (rank + 1,), dtype), group=g)
    for r, got in enumerate(outs):
        equal(got, bits_of(r, (r + 1,), dtype))
    flat = empty(6 * size)
    dist.all_gather_into_tensor(flat, everyone[rank], group=g)
    for got, wanted in zip(flat.chunk(size), everyone, strict=True):
        equal(got, wanted)
    for shape in ((6,), (2, 3), ()):
        x = bits_of(rank, shape, dtype)
        dist.broadcast(x, 1, group=g)
        equal(x, bits_of(1, shape, dtype))
    x, ins = empty(6), everyone if rank == 1 else None
    dist.scatter(x, ins, 1, group=g)
    equal(x, everyone[rank])
    outs = [empty(6) for _ in range(size)] if rank == 1 else None
    dist.gather(everyone[rank], outs, 1, group=g)
    for got, wanted in zip(outs or [], everyone, strict=bool(outs)):
        equal(got, wanted)
    x, right, left = empty(6), (rank + 1) % size, (rank - 1) % size
    sent = dist.isend(everyone[rank], right, group=g)
    dist.recv(x, left, group=g)
    sent.wait()
    equal(x, everyone[left])
    for row in ((), (2,)):  # rank r sends r + to + 1 rows to each

        def rows(src, to, row=row):
            first = sum(src + t + 1 for t in range(to))
            whole = bits_of(src, (sum(src + t + 1 for t in range(size)), *row), dtype)
            return whole[first : first + src + to + 1]

        ours_, theirs = [rank + t + 1 for t in range(size)], [s + rank + 1 for s in range(size)]
        x, out = torch.cat([rows(rank, t) for t in range(size)]), empty(sum(theirs), *row)
        dist.all_to_all_single(out, x, theirs, ours_, group=g)
        for src, got in enumerate(out.split(theirs)):
            equal(got, rows(src, rank))
        outs = [empty(n, *row) for n in theirs]
        dist.all_to_all(outs, [rows(rank, t).clone() for t in range(size)], group=g)
        for src, got in enumerate(outs):
            equal(got, rows(src, rank))
    even = empty(2 * size)
    dist.all_to_all_single(even, bits_of(rank, (2 * size,), dtype), group=g)
    equal(even, torch.cat([bits_of(s, (2 * size,), dtype).chunk(size)[rank] for s in range(size)]))


@pytest.mark.parametrize(("size", "hosts", "ours"), WORLDS, ids=str)
@pytest.mark.parametrize("name", MOVED)
def test_every_element_type_can_be_moved(c10d_worlds, size, hosts, ours, name):
    c10d_worlds(size, hosts).run(moved, ours, name)


def reduced(groups, ours):
    """Sums and averages of complex numbers by every call, and what refuses the others."""
    g = groups[ours]
    size, rank = dist.get_world_size(g), dist.get_rank(g)
    total = complex(sum(range(size)), size)

    def z(n=4):
        return torch.full((n,), complex(rank, 1))

    x = z()
    g.allreduce([x]).wait()
    assert x.tolist() == [total] * 4
    dist.all_reduce(x.copy_(z()), dist.ReduceOp.AVG, group=g)
    assert x.tolist() == [total / size] * 4
    y = z()
    dist.all_reduce_coalesced([x.copy_(z()), y], group=g)
    assert x.tolist() == y.tolist() == [total] * 4
    dist.reduce(x.copy_(z()), 1, group=g)
    assert rank != 1 or x.tolist() == [total] * 4
    out = torch.empty(4, dtype=torch.complex64)
    dist.reduce_scatter_tensor(out, z(4 * size), group=g)
    assert out.tolist() == [total] * 4
    dist.reduce_scatter(out.zero_(), [z() for _ in range(size)], group=g)
    assert out.tolist() == [total] * 4
    uneven = torch.empty(rank + 1, dtype=torch.complex64)
    dist.reduce_scatter(uneven, [z(r + 1) for r in range(size)], group=g)
    assert uneven.tolist() == [total] * (rank + 1)
    said = []
    top = dist.ReduceOp.MAX
    for call in (
        lambda: dist.reduce_scatter_tensor(out, z(4 * size), top, group=g),
        lambda: dist.all_reduce(torch.ones(3, dtype=torch.uint16), group=g),
        lambda: dist.reduce(torch.ones(3, dtype=torch.float8_e5m2), 0, group=g),
    ):
        try:
            call()
        except Exception as e:
            said.append(f"{type(e).__name__}: {e}")
    return said


@pytest.mark.parametrize(("size", "hosts", "ours"), WORLDS, ids=str)
def test_complex_numbers_are_summed_and_what_has_no_sum_is_refused(c10d_worlds, size, hosts, ours):
    for top, unsigned, eight in c10d_worlds(size, hosts).run(reduced, ours):
        assert top == (
            "UnsupportedOperationError: no backend has max of complex64; reduce with sum or avg"
        )
        assert unsigned.startswith("UnsupportedOperationError")
        assert "uint16" in unsigned
        assert "float8_e5m2" in eight
