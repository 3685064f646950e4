"""Who shares a host is proven for every rank, and known alike on all of them."""

import os
import socket
import time

import pytest
import torch.distributed as dist
from shm_ranks import (
    CLONE_NEWNET,
    CLONE_NEWPID,
    await_mark,
    ended,
    failure,
    forked,
    join,
    leftovers,
    mark,
    may_unshare,
    unshare,
)

from sagellm.comm.collective_ops._shm import hosts, identity, meeting
from sagellm.comm.collective_ops._shm.exchange import Exchange
from sagellm.comm.collective_ops._shm.handshake import Listener, connect, take_replies
from sagellm.comm.collective_ops._shm.hosts import Hosts, prove_hosts
from sagellm.core.protocols import CommTimeoutError, PeerLostError

SIZE = 3
needs_namespaces = pytest.mark.skipif(
    not may_unshare(CLONE_NEWNET | CLONE_NEWPID), reason="may not make namespaces"
)


@pytest.fixture
def pool(rank_pools):
    return rank_pools(SIZE)


def told(meet, rank, answer):
    """Give all ranks' answers to all, by files, whatever process they come from."""
    mark(meet, f"answer.{rank}", answer)
    return [await_mark(meet, f"answer.{r}") for r in range(SIZE)]


def proven(rank, size, meet, trick):
    """Every rank's answer to `prove_hosts` when rank 2 does something odd."""

    def ask():
        if rank == 2 and trick is not None:
            trick()
        found = prove_hosts(dist.FileStore(meet, size), rank, size, 10.0)
        told(meet, rank, f"{found.partition} {found.explain()}")

    if rank == 2 and trick is not None:
        assert ended(forked(ask)) == 0
    else:
        ask()
    return told(meet, rank, await_mark(meet, f"answer.{rank}"))[rank]


def leave_network():
    assert unshare(CLONE_NEWNET)


def leave_network_and_lie():
    """Claim to be where the others are."""
    truth = identity.host_claim()
    leave_network()
    hosts.host_claim = lambda: truth


def claim_another_boot():
    hosts.host_claim = lambda: identity.host_claim() | {"boot": "another"}


def claim_nothing():
    hosts.claim = lambda: {"why": "its system has no memfd_create"}


def read_a_wrong_page():
    hosts._as_member = lambda *_: {"secret": "00"}


def alike(rank, size, meet, trick=None):
    return proven(rank, size, meet, globals().get(trick or ""))


def test_ranks_of_one_host_prove_it(pool):
    for answer in pool.run(alike, pool.store_path()):
        assert answer.startswith("((0, 1, 2),)")


@pytest.mark.parametrize(
    ("trick", "why"),
    [
        ("claim_another_boot", "host 1: ranks [2]"),
        ("claim_nothing", "rank 2 is apart: its system has no memfd_create"),
        ("read_a_wrong_page", "rank 2 is apart: it could not read the page"),
    ],
)
def test_rank_that_proves_nothing_is_a_host_of_its_own(pool, trick, why):
    for answer in pool.run(alike, pool.store_path(), trick):
        assert answer.startswith("((0, 1), (2,))")
        assert why in answer


@needs_namespaces
@pytest.mark.parametrize(
    ("trick", "why"),
    [
        ("leave_network", "host 1: ranks [2]"),
        ("leave_network_and_lie", "rank 2 is apart: rank 0 cannot be reached at its socket"),
    ],
)
def test_rank_in_another_network_namespace_is_another_host(pool, trick, why):
    for answer in pool.run(alike, pool.store_path(), trick):
        assert answer.startswith("((0, 1), (2,))")
        assert why in answer


def test_hosts_are_found_by_rank():
    found = Hosts(((0, 2), (1,)), {1: "it is shy"})

    assert found.of(2) == (0, 2)
    assert found.explain() == "host 0: ranks [0, 2]; host 1: ranks [1]; rank 1 is apart: it is shy"


# -- groups ---------------------------------------------------------------------------------


def group_with_a_stranger(rank, size, meet):
    def ask():
        if rank == 2:
            leave_network()
        told(meet, rank, str(failure(lambda: join(rank, size, meet))[1:3]))

    if rank == 2:
        assert ended(forked(ask)) == 0
    else:
        ask()
    return await_mark(meet, f"answer.{rank}")


@needs_namespaces
def test_group_across_hosts_is_refused_on_every_rank(pool):
    for answer in pool.run(group_with_a_stranger, pool.store_path()):
        assert "BackendUnavailableError" in answer
        assert "rank 2: another network namespace than rank 0" in answer
        assert "hier or gloo" in answer


def in_a_pid_namespace(rank, size, meet):
    def work():
        b = join(rank, size, meet)
        x = b.all_gather(__import__("torch").tensor([os.getpid()]))
        told(meet, rank, str([int(t) for t in x]))
        b.barrier()
        b.close()

    def inside():
        assert unshare(CLONE_NEWPID)
        assert ended(forked(work)) == 0

    if rank == 2:
        assert ended(forked(inside)) == 0
    else:
        work()
    return await_mark(meet, f"answer.{rank}")


@needs_namespaces
def test_ranks_in_other_pid_namespaces_meet(pool):
    answers = pool.run(in_a_pid_namespace, pool.store_path())

    assert len(set(answers)) == 1
    assert answers[0].endswith(", 1]")  # the first process of its namespace


def dies_in_a_pid_namespace(rank, size, meet):
    def work():
        join(rank, size, meet).barrier()
        os._exit(7)  # as a first process of a namespace it cannot kill itself

    def inside():
        assert unshare(CLONE_NEWPID)
        assert ended(forked(work)) == 7

    if rank == 2:
        assert ended(forked(inside)) == 0
        return None
    b = join(rank, size, meet)
    b.barrier()
    found = failure(b.barrier)
    b.close()
    return found[1], found[3]


@needs_namespaces
def test_rank_that_dies_in_another_pid_namespace_is_lost(pool):
    first, second, _ = pool.run(dies_in_a_pid_namespace, pool.store_path())

    assert first == second == ("PeerLostError", 2)


def keys_are_removed(rank, size, meet):
    store = dist.FileStore(meet, size)
    first = store.num_keys()
    b = join(rank, size, meet)
    b.barrier()
    exchange = Exchange(store, rank, size, "sync", 5.0)
    exchange.all("met", {})
    left = store.num_keys()
    b.close()
    return first, left


def test_keys_of_a_meeting_are_removed(pool):
    for _, left in pool.run(keys_are_removed, pool.store_path()):
        # A turn for each rank and group, the file store's own, and those of this test's exchange.
        assert left <= 4 * SIZE


def meets_again(rank, size, meet):
    found, before = [], leftovers()
    for _ in range(3):
        b = join(rank, size, meet)
        found.append(b.all_reduce(__import__("torch").ones(1)).item())
        b.barrier()
        b.close()
    return found, before, leftovers()


def test_group_can_be_made_again_under_its_name(pool):
    for found, before, after in pool.run(meets_again, pool.store_path()):
        assert found == [3.0] * 3
        assert after == before


# -- the handshake --------------------------------------------------------------------------


@pytest.fixture
def listener():
    made = Listener(8)
    yield made
    made.close()


def served(listener, claims, wanted, tries=200):
    for _ in range(tries):
        came = listener.serve(0, claims, wanted)
        if came:
            return came
    return {}


def test_handshake_proves_both_sides(listener):
    nonce = os.urandom(16)
    link = connect(listener.address, 1, nonce, 0, listener.nonce, time.monotonic() + 5)

    came = served(listener, {0: listener.nonce, 1: nonce}, {1})

    assert list(came) == [1]
    assert take_replies({0: link}, nonce, {0: listener.nonce}, 1.0) == {0}
    came[1].close()
    with pytest.raises(PeerLostError, match="rank 0 is gone"):
        meeting.require_alive({0: link})
    link.close()


@pytest.mark.parametrize("stranger", ["wrong nonce", "noise", "silence", "unwanted rank"])
def test_strangers_are_sent_away(listener, stranger):
    nonce = os.urandom(16)
    claims = {0: listener.nonce, 1: nonce}
    if stranger in ("noise", "silence"):
        link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        link.connect(b"\0" + listener.address.encode())
        if stranger == "noise":
            link.send(b"GET / HTTP/1.1\r\n\r\n")
    else:
        sent = os.urandom(16) if stranger == "wrong nonce" else nonce
        link = connect(listener.address, 1, sent, 0, listener.nonce, time.monotonic() + 5)

    came = served(listener, claims, set() if stranger == "unwanted rank" else {1}, tries=20)

    assert came == {}
    if stranger != "silence":
        assert link.recv(100) == b""
    link.close()


def test_exchange_names_the_ranks_that_said_nothing(tmp_path):
    exchange = Exchange(dist.FileStore(str(tmp_path / "store"), 3), 0, 3, "alone", 0.1)

    with pytest.raises(CommTimeoutError, match=r"no sign of rank 1, 2 of 3 within 0\.1 s"):
        exchange.all("claim", {})


def test_cores_are_counted_together():
    mine = {"cpus": [0, 1], "quota": None, "cgroup": "/a"}
    other = {"cpus": [2], "quota": 1.5, "cgroup": "/b"}

    assert identity.usable_cpus([mine, other]) == 3
    assert identity.usable_cpus([other, other]) == 1
    assert identity.usable_cpus([{**mine, "quota": 1.0}, other]) == 2
    assert identity.polls_for(2, 2) > identity.polls_for(3, 2)
