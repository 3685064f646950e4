"""A bounded run of `fuzz_shm`; run that file as a program for longer ones."""

import pytest
from fuzz_plan import OPS
from fuzz_shm import run_rank

from sagellm.comm.collective_ops._shm.engines import available_engines

CALLS = {2: 1500, 3: 600, 4: 600}


def fuzz(backend, engine, seed):
    return run_rank(backend.rank, backend.size, CALLS[backend.size], engine, seed)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("engine", ["native", "python"])
def test_mixed_calls_on_several_groups_agree_with_gloo(gloo_pools, engine, size):
    if engine not in available_engines():
        pytest.skip(f"no {engine} engine on this machine")

    counts = gloo_pools(size).run(fuzz, engine, size, timeout_s=100)[0]

    assert sum(counts.values()) >= CALLS[size]
    assert set(counts) == set(OPS)
