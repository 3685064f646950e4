"""Works of a group: polling, short waits, and sizes that peers announce."""

import time
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
dist = pytest.importorskip("torch.distributed")

from sagellm.core.protocols import (  # noqa: E402
    CommTimeoutError,
    IntegrityError,
)
from sagellm.core.protocols.process_group import (  # noqa: E402
    RawWork,
    TensorBackend,
    Transport,
)


def same(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def polled(work):
    """Ask `done()` and nothing else until it says yes."""
    end = time.monotonic() + 10
    while not work.done():
        assert time.monotonic() < end, "done() never turned True"
        time.sleep(0.001)
    return work


POLLED = {
    "all_gather": lambda b, x: b.all_gather(x, async_op=True),
    "all_gather_into_tensor": lambda b, x: b.all_gather_into_tensor(
        torch.empty(8), x, async_op=True
    ),
    "all_reduce": lambda b, x: b.all_reduce(x, async_op=True),
    "all_reduce avg": lambda b, x: b.all_reduce(x, "avg", async_op=True),
    "all_to_all": lambda b, x: b.all_to_all([x, x], async_op=True),
    "all_to_all_single": lambda b, x: b.all_to_all_single(torch.empty(4), x, async_op=True),
    "barrier": lambda b, x: b.barrier(async_op=True),
    "broadcast": lambda b, x: b.broadcast(x, 0, async_op=True),
    "gather": lambda b, x: b.gather(x, 0, async_op=True),
    "reduce": lambda b, x: b.reduce(x, 0, async_op=True),
    "reduce_scatter": lambda b, x: b.reduce_scatter([x, x], async_op=True),
    "reduce_scatter_tensor": lambda b, x: b.reduce_scatter_tensor(torch.empty(2), x, async_op=True),
    "scatter": lambda b, x: b.scatter(
        torch.empty(4), [x, x] if b.rank == 0 else None, 0, async_op=True
    ),
    "send, recv": lambda b, x: (
        b.recv(x, 0, async_op=True) if b.rank else b.send(x, 1, async_op=True)
    ),
    "kv": lambda b, x: (
        b.recv_kv_blocks(0, async_op=True) if b.rank else b.send_kv_blocks([x], 1, async_op=True)
    ),
}


@pytest.mark.parametrize("op", POLLED)
def test_done_turns_true_without_anybody_waiting(ranks, op):
    ranks(2).run(lambda b: polled(POLLED[op](b, torch.ones(4))).result())


def test_reduce_scatter_is_right_and_keeps_short_waits_and_deadlines(ranks):
    def body(b):
        out = torch.empty(2, 2)
        b.reduce_scatter_tensor(out, torch.arange(8.0), async_op=True).wait()
        same(out, (torch.arange(4.0) + 4 * b.rank).view(2, 2) * 2)

    ranks(2).run(body)
    backends = ranks(2).backends()
    work = backends[0].reduce_scatter([torch.ones(2)] * 2, async_op=True)
    start = time.monotonic()
    with pytest.raises(CommTimeoutError, match="still in flight"):
        work.wait(0.02)
    backends[0].timeout_s = 0.3
    with pytest.raises(CommTimeoutError, match="rank 1"):
        backends[0].reduce_scatter([torch.ones(2)] * 2)
    assert time.monotonic() - start < 3


class Liar(Transport):
    """Rank 0 of two, whose peer announces whatever a test wants in every all-to-all."""

    rank, size, global_ranks, group_name = 0, 2, (0, 1), "liar"
    device = torch.device("cpu")

    def __init__(self, row):
        self.row = row
        self.aborted = ""

    def issue(self, call):
        assert call.op == "all_to_all", "nothing else may be sent on such an answer"
        out = call.outputs[0]
        out[0] = call.inputs[0][0]
        out[1] = torch.tensor(self.row)
        return Done()

    def issue_batch(self, calls):
        return [self.issue(call) for call in calls]

    def explain_failure(self, describe, error):
        self.abort(describe)
        return error

    def abort(self, reason):
        self.aborted = reason

    def close(self):
        pass

    def split(self, ranks, name, timeout_s):
        return None


class Done(RawWork):
    def wait(self, timeout_s):
        return True

    synchronize = wait

    def done(self):
        return True


class OverAnything(TensorBackend):
    def _wrap(self, transport):
        return OverAnything(self.spec, transport)

    @property
    def process_group(self):
        return None


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ([4, 1, -1] + [0] * 7, "is no shape"),
        ([4, 9, 1] + [0] * 7, "announces 9 dimensions"),
        ([4, -1, 1] + [0] * 7, "announces -1 dimensions"),
        ([4, 1, 1, 7] + [0] * 6, "is no shape"),
        ([4, 1, 1 << 62] + [0] * 7, "is no shape"),
        ([4, 2, 1 << 20, 1 << 20] + [0] * 6, "more than 68719476736"),
        ([8, 1, 3] + [0] * 7, "elements of 8 bytes, this rank has 4"),
    ],
)
def test_sizes_that_a_peer_announces_are_bounded(row, text, spec):
    uneven = replace(spec, capabilities=replace(spec.capabilities, uneven=True))
    transport = Liar(row)
    backend = OverAnything(uneven, transport)
    with pytest.raises(IntegrityError, match=text):
        backend.all_to_all([torch.ones(2), torch.ones(3)])
    assert "all_to_all" in transport.aborted
    with pytest.raises(IntegrityError, match="the group is dead"):
        backend.barrier()
