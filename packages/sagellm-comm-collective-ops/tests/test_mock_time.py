"""The mock's virtual clock, its traffic, and its faults, with schedules and without."""

import pytest
import torch

from sagellm.comm.collective_ops import MockLinks, MockWorld
from sagellm.comm.collective_ops.schedules import check_schedule, make_schedule
from sagellm.core.protocols import CommTimeoutError, ConfigError

A, B = 5e-6, 1e9  # latency of a message, bytes a second
SIZES = (2, 3, 4, 5, 8)


def world_of(size, algorithm, op="all_reduce", **more):
    return MockWorld(size, links=MockLinks(A, B), algorithms=f"{op}:{algorithm}", **more)


def after_all_reduce(size, algorithm, nbytes):
    """Slowest rank's time, and what each sent."""
    world = world_of(size, algorithm)
    got = world.run(lambda b: b.all_reduce(torch.full((nbytes // 4,), float(b.rank)))[0].item())
    assert got == [size * (size - 1) / 2] * size
    return max(map(world.now, range(size))), [world.sent_bytes(r) for r in range(size)]


@pytest.mark.parametrize("size", SIZES)
def test_ring_all_reduce_moves_two_times_n_minus_one_nths(size):
    nbytes = 4 * 840
    seconds, sent = after_all_reduce(size, "ring", nbytes)
    assert sent == [2 * (size - 1) * nbytes // size] * size
    assert seconds == pytest.approx(2 * (size - 1) * (A + nbytes / size / B))


@pytest.mark.parametrize("size", SIZES)
def test_direct_and_two_shot_all_reduce_cost_what_they_should(size):
    nbytes = 4 * 840
    seconds, sent = after_all_reduce(size, "direct", nbytes)
    assert sent == [(size - 1) * nbytes] * size
    assert seconds == pytest.approx(A + (size - 1) * nbytes / B)
    seconds, sent = after_all_reduce(size, "two_shot", nbytes)
    assert sent == [2 * (size - 1) * nbytes // size] * size
    assert seconds == pytest.approx(2 * (A + (size - 1) * nbytes / size / B))


@pytest.mark.parametrize("size", [2, 4, 8])
def test_powers_of_two_cost_what_the_formulas_say(size):
    nbytes, log = 4 * 840, size.bit_length() - 1
    seconds, sent = after_all_reduce(size, "recursive_doubling", nbytes)
    assert sent == [log * nbytes] * size
    assert seconds == pytest.approx(log * (A + nbytes / B))
    seconds, sent = after_all_reduce(size, "halving_doubling", nbytes)
    assert sent == [2 * (size - 1) * nbytes // size] * size
    assert seconds == pytest.approx(2 * log * A + 2 * (size - 1) / size * nbytes / B)
    seconds, sent = after_all_reduce(size, "tree", nbytes)
    assert sum(sent) == 2 * (size - 1) * nbytes
    assert seconds == pytest.approx(2 * log * (A + nbytes / B))


@pytest.mark.parametrize("algorithm", ["recursive_doubling", "tree"])
def test_steps_are_those_that_the_proof_counts(algorithm):
    world = MockWorld(7, links=MockLinks(0.0, 256.0), algorithms=f"all_reduce:{algorithm}")
    world.run(lambda b: b.all_reduce(torch.ones(64)))
    depth = check_schedule(make_schedule("all_reduce", algorithm, 7)).depth
    assert max(map(world.now, range(7))) == depth


def test_every_byte_of_every_operation_is_one_of_its_schedule():
    def body(b):
        x = torch.ones(12)
        b.all_gather_into_tensor(torch.empty(12 * b.size), x)
        b.reduce_scatter_tensor(torch.empty(12), torch.ones(12 * b.size))
        b.broadcast(x, 1)
        b.reduce(x, 2)
        b.all_to_all_single(torch.empty(12), x)

    world = MockWorld(
        4,
        algorithms="all_gather:ring,reduce_scatter:ring,broadcast:tree,reduce:ring,"
        "all_to_all:pairwise",
    )
    world.run(body)
    wanted = [
        ("all_gather", "ring", 48, 0), ("reduce_scatter", "ring", 48, 0),
        ("broadcast", "tree", 12, 1), ("reduce", "ring", 12, 2), ("all_to_all", "pairwise", 12, 0),
    ]  # fmt: skip
    for rank in range(4):
        assert world.sent_bytes(rank) == sum(
            make_schedule(op, name, 4, root=root).sent_bytes(rank, n, 4)
            for op, name, n, root in wanted
        )
    assert {t.op for t in world.ledger} == {"send", "recv"}


def test_calls_that_are_not_made_of_messages_take_the_time_of_a_ring():
    world = MockWorld(4, links=MockLinks(A, B))
    world.advance(2, 1.0)
    world.run(lambda b: b.all_reduce(torch.ones(1000)))
    assert [world.now(r) for r in range(4)] == pytest.approx([1 + 6 * (A + 1000 / B)] * 4)


def test_only_the_slow_hops_of_a_ring_cost():
    far = {(a, b): (1.0, B) for a in range(4) for b in range(4) if a // 2 != b // 2}
    world = MockWorld(4, links=MockLinks(0.0, B, far), algorithms="all_gather:ring")
    world.run(lambda b: b.all_gather(torch.ones(1)))
    assert max(map(world.now, range(4))) == pytest.approx(2.0, abs=1e-6)


def test_time_is_the_same_in_every_run():
    def once():
        world = world_of(5, "halving_doubling")
        world.advance(3, 1e-4)
        world.delay(1, 2e-5, virtual=True)
        world.run(lambda b: [b.all_reduce(torch.ones(77)) for _ in range(5)])
        return [world.now(r) for r in range(5)]

    assert once() == once() == once()


def test_virtual_delay_holds_everybody_back_without_sleeping():
    world = world_of(2, "ring")
    world.delay(1, 1e6, virtual=True)
    world.run(lambda b: b.all_reduce(torch.ones(4)))
    assert world.now(0) > 1e6
    world.heal(1)
    before = world.now(0)
    world.run(lambda b: b.barrier())
    world.run(lambda b: b.all_reduce(torch.ones(4)))
    assert world.now(0) - before < 1e6


def test_lost_message_is_missed_at_the_deadline():
    world = world_of(2, "ring", timeout_s=0.2)
    world.lose_messages(1)

    world.backend(1).all_reduce(torch.ones(4), async_op=True)
    with pytest.raises(CommTimeoutError, match="ring schedule: no recv with rank 1"):
        world.backend(0).all_reduce(torch.ones(4))


def test_corrupt_message_spoils_what_it_reaches():
    world = world_of(3, "ring")
    world.corrupt(1, "send")
    assert all(x.tolist() != [3.0] * 6 for x in world.run(lambda b: b.all_reduce(torch.ones(6))))


def test_calls_in_flight_keep_their_order_with_messages_of_ones_own():
    def body(b):
        xs = [torch.full((5,), float(i)) for i in range(4)]
        works = [b.all_reduce(x, async_op=True) for x in xs]
        peer = (b.rank + 1) % b.size
        b.send(torch.ones(1), peer)
        b.recv(torch.ones(1), (b.rank - 1) % b.size)
        last = b.all_reduce(torch.ones(1)).item()
        for work in reversed(works):
            work.wait()
        with b.coalesce():
            y = b.all_reduce(torch.ones(2))
        with torch.inference_mode():
            z = b.all_reduce(torch.ones(2), async_op=True).wait()
        return [x[0].item() for x in xs], last, y[0].item(), z[0].item()

    assert world_of(3, "ring").run(body) == [([0.0, 3.0, 6.0, 9.0], 3.0, 3.0, 3.0)] * 3


def test_bad_links_are_refused():
    with pytest.raises(ConfigError, match=r"bytes_per_s > 0, got 0\.0 and 0"):
        MockLinks(bytes_per_s=0)
    with pytest.raises(ConfigError, match="latency_s >= 0"):
        MockLinks(between={(0, 1): (-1.0, 1.0)})
