"""`dist.all_reduce` on shm: results, counts and errors on its short way and beside it."""

import torch
import torch.distributed as dist
from shm_ranks import engines, failure

from sagellm.comm.collective_ops import register_c10d_backend

SIZE = 2


def summed(g, x):
    """Two calls, from ones: torch's own checks are those of every other group."""
    for _ in range(2):
        dist.all_reduce(x, group=g)
    assert x.detach().tolist() == [float(SIZE**2)] * 3


def counted(g):
    return g.backend.get_stats().ops["all_reduce"].calls


def odd_tensors(g):
    summed(g, torch.ones(3))
    with torch.no_grad():
        summed(g, torch.nn.Parameter(torch.ones(3)))
        summed(g, torch.ones(3, requires_grad=True))
    inside = torch.ones(3)
    with torch.inference_mode():
        summed(g, inside)
        summed(g, made := torch.ones(3))
    assert made.is_inference()
    summed(g, inside.fill_(1))
    assert counted(g) == 12


def hooks(g):
    seen, over = [], []
    take_over = g.backend.add_hook(take_over=lambda call: seen.append(call.op))  # declines
    summed(g, torch.ones(3))
    remove = g.backend.add_hook(
        before=lambda call: seen.append(call.op),
        after=lambda call, seconds, error: over.append((call.op, error)),
    )
    take_over()
    summed(g, torch.ones(3))
    remove()
    summed(g, torch.ones(3))
    assert seen == ["all_reduce"] * 4
    assert over == [("all_reduce", None)] * 2
    assert counted(g) == 18


def closed(g):
    dist.barrier(group=g)
    g.backend.close()
    x = torch.ones(3)
    _, kind, text, *_ = failure(lambda: dist.all_reduce(x, group=g))
    assert "closed" in text, (kind, text)
    assert x.tolist() == [1.0] * 3


def the_short_way(groups):
    for engine in engines():
        register_c10d_backend(f"short_{engine}", options={"engine": engine})
        g = dist.new_group(backend=f"short_{engine}")
        assert g.backend.engine == engine
        odd_tensors(g)
        hooks(g)
        g.backend.reset_stats()
        summed(g, torch.ones(3))
        assert counted(g) == 2
        closed(g)


def test_the_short_way_differs_in_nothing_but_speed(fresh_c10d):
    fresh_c10d(SIZE).run(the_short_way)
