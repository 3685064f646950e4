"""The comm-backend suite over ranks that are processes and meet at a file."""

import time

import torch

from sagellm.core.protocols import BackendSpec, Capabilities, ConfigError, Probe
from sagellm.core.protocols.process_group import ProcessGroupBackend
from sagellm.core.protocols.testing import BackendTarget, check_backend

OPS = frozenset(
    "all_gather all_gather_into_tensor all_reduce all_to_all all_to_all_single barrier broadcast "
    "gather recv reduce reduce_scatter reduce_scatter_tensor scatter send".split()
)
DTYPES = frozenset("float32 float64 float16 bfloat16 int8 uint8 int32 int64".split())


def gloo_capabilities():
    reduce_ops = frozenset({"sum", "min", "max", "product", "band", "bor", "bxor"})
    return Capabilities(ops=OPS, reduce_ops=reduce_ops, dtypes=DTYPES, uneven=True)


def gloo_probe():
    return Probe(True, "part of torch")


def gloo_load():
    return ProcessGroupBackend


GLOO = BackendSpec(
    "gloo", ("cpu",), "gloo", 0, gloo_capabilities(), probe=gloo_probe, load=gloo_load
)


def test_processes_over_a_torch_group(rank_pool):
    names = ["says*", "all_reduce[*-float32]", "all_reduce[sum-bool]", "send and recv", "barrier",
             "kv blocks", "a peer that never comes"]  # fmt: skip

    report = check_backend(BackendTarget(GLOO), ranks=rank_pool, only=[*names, "all_reduce[avg-*"])

    assert report.ok(), report.text()
    assert "all_reduce[sum-bool]" in [e.check for e in report.of("refused")]


def come_late(rank, size, meet):
    if rank:
        time.sleep(2)  # as a busy machine would have it
    with BackendTarget(GLOO).make(rank, size, meet, 1.0) as backend:
        backend.timeout_s = 20.0
        return backend.all_reduce(torch.ones(1)).item()


def test_ranks_that_come_late_meet_whatever_the_deadline_of_their_calls_is(rank_pool):
    assert rank_pool.run(come_late, rank_pool.store_path()) == [rank_pool.size] * rank_pool.size


def joined(rank, size, meet, *, timeout_s):
    raise ConfigError(f"rank {rank} of {size} cannot join {meet}")


def test_a_backend_that_cannot_be_made_is_reported(rank_pool):
    report = check_backend(BackendTarget(joined), ranks=rank_pool, only=["explain"])

    assert "cannot join" in report.of("failed")[0].detail
