"""What threads of one rank do at the same time, each interleaving built by hand."""

import threading
from types import SimpleNamespace

import pytest
import torch

from sagellm.comm.collective_ops._shm.hot import HotPath
from sagellm.comm.collective_ops._shm.p2p import Messages, _Message
from sagellm.comm.collective_ops._shm.rings import SMALL
from sagellm.core.protocols import PeerLostError
from sagellm.core.protocols.process_group import RawCall


class PausingPath(HotPath):
    """Stops for a moment when another thread than the maker has read whether calls are allowed."""

    def __init__(self, *args):
        self.read, self.go_on = threading.Event(), threading.Event()
        self.maker = threading.current_thread()
        super().__init__(*args)

    @property
    def _allowed(self):
        found = self.allowed
        if threading.current_thread() is not self.maker:
            self.read.set()
            self.go_on.wait(0.2)
        return found

    @_allowed.setter
    def _allowed(self, allowed):
        self.allowed = allowed


@pytest.mark.parametrize("change", ["allow", "stop"])
def test_a_queue_that_runs_empty_undoes_nobodys_refusal(change):
    transport = SimpleNamespace(busy=False, on_change=None)
    hot = PausingPath(transport, 2, 1.0)
    queue = threading.Thread(target=transport.on_change, args=(False,))
    queue.start()
    assert hot.read.wait(5)
    if change == "allow":
        hot.allow(False)
    else:
        hot.stop()
    hot.go_on.set()
    queue.join(5)
    assert not hot.all_reduce(torch.ones(1), "sum")
    assert not hot._hot


def lost(asked):
    def health(peer):
        asked.release()
        raise PeerLostError("rank 1 is gone", rank=1)

    return health


def test_a_message_in_another_threads_hands_is_not_reported_lost():
    asked = threading.Semaphore(0)
    messages = Messages({}, health=lost(asked), who=str, polls=1, name="test")
    work = _Message(messages, RawCall("recv", outputs=[torch.zeros(1)], peer=1, timeout_s=20))
    waiter = threading.Thread(target=messages.advance, args=(work, 20.0))
    with messages._lock:
        waiter.start()
        for _ in range(3):
            asked.acquire(timeout=5)
        work.end()  # the message has come
    waiter.join(5)
    assert (work.over, work.error) == (True, None)


class LateRing:
    """A ring in which a message appears once the peer was found to be gone."""

    def __init__(self, asked):
        self.asked, self.frames = asked, [(SMALL, 1, 7, 4, torch.zeros(4, dtype=torch.uint8))]

    def peek(self):
        return self.frames[0] if self.frames and self.asked.acquire(blocking=False) else None

    def drop(self, frame):
        self.frames.remove(frame)


def test_a_message_that_came_as_its_sender_left_is_found():
    asked = threading.Semaphore(0)
    rings = {1: (SimpleNamespace(space=lambda: -1), LateRing(asked))}
    messages = Messages(rings, health=lost(asked), who=str, polls=1, name="test")
    assert messages.sender_of(7) == 1
    with pytest.raises(PeerLostError):
        messages.sender_of(8)
