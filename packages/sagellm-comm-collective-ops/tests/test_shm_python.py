"""What only the Python engine has: flags of its own, cached views, and numpy beneath."""

import warnings

import numpy as np
import pytest
import torch
from shm_harness import ENGINES, LONG_S, engine_of, fails

from sagellm.comm.collective_ops._shm.python_memory import CACHED_VIEWS
from sagellm.core.protocols.process_group import RawCall

pytestmark = pytest.mark.skipif("python" not in ENGINES, reason="no Python engine on this machine")


def overflow_quietly(backend, folder):
    with engine_of(backend, folder, "python") as engine, warnings.catch_warnings():
        warnings.simplefilter("error")
        with np.errstate(all="raise"):
            x = torch.full((8,), 3e38)
            engine.run(RawCall("all_reduce", [], [x], reduce_op="sum"))
            prepared = engine.prepare("all_reduce", x, x, "max", LONG_S)
            prepared()
        assert x.isinf().all()


def test_overflow_is_infinity_whatever_numpy_is_told_to_do_of_it(gloo_pools, folder):
    gloo_pools(2).run(overflow_quietly, folder())


def use_many_sizes(backend, folder):
    with engine_of(backend, folder, "python") as engine:
        for n in range(1, 2 * CACHED_VIEWS + 2):
            engine.run(RawCall("all_reduce", [], [torch.ones(n)], reduce_op="sum"))
        return engine._memory.views.cache_info().currsize


def test_views_of_many_sizes_are_not_all_kept(gloo_pools, folder):
    assert gloo_pools(2).run(use_many_sizes, folder()) == [CACHED_VIEWS] * 2


def fail_inside(backend, folder):
    with engine_of(backend, folder, "python") as engine:
        x = torch.zeros(4)
        if backend.rank == 0:
            with pytest.raises(KeyError):
                engine.run(RawCall("all_reduce", [], [x], reduce_op="no such"))
        call = RawCall("all_reduce", [], [x], reduce_op="sum", timeout_s=LONG_S)
        return fails(lambda: engine.run(call))


def test_an_error_in_a_call_reaches_the_peers(gloo_pools, folder):
    assert gloo_pools(2).run(fail_inside, folder()) == [("error", 0)] * 2
