"""Blocks over a communication backend that was handed in: gloo, two ranks in this process."""

import gc
import itertools
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch

from sagellm.comm.kv_transfer import KVTransferSettings
from sagellm.comm.kv_transfer.transports.comm import CommTransport
from sagellm.core.protocols import (
    BackendSpec,
    BackendUnavailableError,
    Capabilities,
    IntegrityError,
    PeerLostError,
    Probe,
    TransferKey,
)
from sagellm.core.protocols.process_group import ProcessGroupBackend
from sagellm.core.protocols.testing.transport_suite import check_transport

GLOO = BackendSpec(
    name="gloo",
    device_types=("cpu",),
    c10d_name="gloo",
    priority=1,
    capabilities=Capabilities(
        ops=frozenset({"send", "recv"}),
        reduce_ops=frozenset(),
        dtypes=frozenset(),
        move_dtypes=frozenset({"uint8"}),
    ),
    probe=lambda: Probe(True, "a test"),
    load=lambda: ProcessGroupBackend,
)


def make_backends(size=2):
    import torch.distributed as dist

    store = dist.HashStore()

    def make(rank):
        group = dist.ProcessGroup(store, rank, size)
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(interface="lo")]
        options._timeout = timedelta(seconds=20)
        gloo = dist.ProcessGroupGloo(store, rank, size, options)
        kind = dist.ProcessGroup.BackendType.GLOO
        group._register_backend(torch.device("cpu"), kind, gloo)
        group._set_default_backend(kind)
        if not hasattr(group, "get_group_store"):  # torch 2.6 keeps stores in a table
            dist.distributed_c10d._world.pg_map[group] = ("gloo", store)
        return ProcessGroupBackend(GLOO, group, timeout_s=20)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(make, range(size)))


@pytest.fixture(scope="module")
def backends():
    return make_backends()


def test_the_contract_of_transports_holds_over_gloo(backends):
    turn = itertools.count()

    report = check_transport(lambda: CommTransport(comm=backends[next(turn) % 2]))

    assert report.ok(), report


@pytest.mark.parametrize("pull", [False, True])
def test_blocks_go_over_gloo_and_are_checked(pair, backends, pull):
    """Node ids are not ranks: node 0 is rank 1."""
    named = KVTransferSettings(transport="comm")
    sides = [{"comm": backends[1 - i], "settings": named} for i in range(2)]
    out, a, into, b = pair(blocks=200, sender=sides[0], receiver=sides[1], page=32, dim=32)
    ids = torch.randperm(200)[:150].numpy()

    if pull:
        out.offer(TransferKey("k"), ids, num_tokens=1, ttl_s=20)
        r = into.fetch(TransferKey("k"), 0, ids)
    else:
        t = out.transfer(ids, 1, key=TransferKey("k"))
        r = into.receive(TransferKey("k"), ids)
        t.wait(20)
    r.wait(20)

    assert all(torch.equal(a[n][ids], b[n][ids]) for n in a)
    assert r.metrics.path == "comm:1"
    assert r.metrics.verify_s > 0


def test_auto_prefers_a_transport_that_can_be_stopped(pair, backends):
    out, _, _, _ = pair(sender={"comm": backends[0]}, receiver={"comm": backends[1]})

    out.connect(1, timeout_s=10)

    assert out.path(1).startswith(("tcp", "shm"))


def test_what_cannot_be_used_says_why(backends, channel):
    named = KVTransferSettings(transport="comm")

    with pytest.raises(BackendUnavailableError, match="comm="):
        channel(settings=named)
    with pytest.raises(BackendUnavailableError, match="does not encrypt"):
        CommTransport(comm=backends[0], tls=object())


def test_a_rank_of_another_group_is_not_reached(backends):
    ours = CommTransport(comm=backends[0])
    others = CommTransport(comm=backends[0])
    others._group = "of others"

    assert "another group" in ours.reaches(others.endpoint()).reason
    assert "not another rank" in ours.reaches(ours.endpoint()).reason
    with pytest.raises(PeerLostError, match="another group"):
        ours.connect(others.endpoint(), b"t" * 32, 5)
    ours.close()
    others.close()


def connected(backends):
    ends = [CommTransport(comm=b) for b in backends]
    found = []
    thread = threading.Thread(target=lambda: found.append(ends[1].accept(b"t" * 32, 10)))
    thread.start()
    ours = ends[0].connect(ends[1].endpoint(), b"t" * 32, 10)
    thread.join(10)
    return ends, ours, found[0]


@pytest.mark.parametrize("said", [(0, 1 << 40), (7, 1 << 40), (1 << 20, 5), (0, 0)])
def test_a_senseless_announcement_allocates_nothing(backends, said):
    from sagellm.comm.kv_transfer.transports.comm import _ANNOUNCEMENT

    ends, ours, theirs = connected(backends)
    ours._there.send([memoryview(_ANNOUNCEMENT.pack(*said))], 5)

    with pytest.raises(IntegrityError, match="announces"):
        theirs.receive([memoryview(bytearray(10))], 5)
    for x in (ours, theirs, *ends):
        x.close()


def test_a_sender_whose_receiver_does_not_read_begins_no_operation(backends, monkeypatch):
    """It would stay in the group for ever, and fail it in the end."""
    ends, ours, theirs = connected(backends)
    begun = []
    monkeypatch.setattr(ends[0], "begin", lambda *a: begun.append(a))
    failed = []

    def send():
        try:
            ours.send([memoryview(bytes(1 << 20))], 30)
        except PeerLostError as e:
            failed.append(e)

    thread = threading.Thread(target=send)
    thread.start()
    theirs.abort()
    thread.join(10)

    assert failed
    assert not begun
    for x in (ours, theirs, *ends):
        x.close()


class FailedWork:
    """An operation of a group that has failed, which may write its memory still."""

    over = False

    def synchronize(self, timeout_s):
        raise PeerLostError("another rank died")

    def done(self):
        return self.over


def test_memory_of_an_operation_that_failed_is_kept_until_it_has_ended(backends):
    ends, ours, theirs = connected(backends)
    work, tensor = FailedWork(), torch.zeros(8)
    gone = weakref.ref(tensor)

    with pytest.raises(PeerLostError, match="another rank died"):
        ours._wait(work, tensor, 5)
    del tensor
    gc.collect()
    assert gone() is not None

    work.over = True
    ends[0].keep(FailedWork(), torch.zeros(8))
    gc.collect()
    assert gone() is None
    for x in (ours, theirs, *ends):
        x.close()
