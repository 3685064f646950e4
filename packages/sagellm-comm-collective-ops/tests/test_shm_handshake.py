"""The socket at which ranks meet: who is let in, and how much a crowd of strangers may cost."""

import contextlib
import errno
import os
import resource
import socket
import time
from types import SimpleNamespace

import pytest

from sagellm.comm.collective_ops._shm import handshake
from sagellm.comm.collective_ops._shm.handshake import Listener, connect
from sagellm.comm.collective_ops._shm.meeting import _Crowd
from sagellm.core.protocols import CommTimeoutError

BACKLOG = 4


@pytest.fixture
def listener():
    made = Listener(BACKLOG)
    yield made
    made.close()


@pytest.fixture
def guests():
    with contextlib.ExitStack() as stack:
        yield stack


def guest_at(listener, guests):
    """A connection that says nothing; None if the listener has no room."""
    link = guests.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    link.settimeout(0)
    try:
        link.connect(b"\0" + listener.address.encode())
    except BlockingIOError:
        return None
    return link


def is_sent_away(link):
    try:
        return link.recv(1) == b""
    except BlockingIOError:
        return False


def come(listener, claims):
    """The ranks that have come, whose connections end here."""
    found = listener.serve(0, claims, {1})
    for link in found.values():
        link.close()
    return list(found)


@contextlib.contextmanager
def no_descriptor_left():
    free = os.dup(0)
    os.close(free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_guest_of_another_user_is_sent_away_before_it_says_a_word(listener, guests, monkeypatch):
    monkeypatch.setattr(handshake, "_uid", lambda link: os.getuid() + 1)
    link = guest_at(listener, guests)
    listener.serve(0, {}, {1})
    assert is_sent_away(link)


def test_silent_guests_are_few_and_keep_no_rank_out(listener, guests):
    links = []
    for _ in range(5):
        while (link := guest_at(listener, guests)) is not None:
            links.append(link)
        listener.serve(0, {}, {1})
    kept = [link for link in links if not is_sent_away(link)]
    assert len(links) >= 4 * BACKLOG
    assert len(kept) <= 2 * BACKLOG  # here, or waiting to be accepted

    nonce = os.urandom(16)
    listener.serve(0, {}, {1})
    guests.enter_context(
        connect(listener.address, 1, nonce, 0, listener.nonce, time.monotonic() + 5)
    )
    assert come(listener, {0: listener.nonce, 1: nonce}) == [1]


def test_a_crowd_keeps_no_rank_out_that_has_said_who_it_is(listener, guests):
    nonce = os.urandom(16)
    claims = {0: listener.nonce, 1: nonce}
    rank = guest_at(listener, guests)
    assert listener.serve(0, claims, {1}) == {}
    rank.send(handshake._HELLO.pack(handshake._MAGIC, 1, nonce, listener.nonce))
    for _ in range(BACKLOG):
        assert guest_at(listener, guests) is not None
    assert come(listener, claims) == [1]


@pytest.mark.parametrize("error", [errno.ECONNABORTED, errno.EPERM])
def test_a_guest_that_fails_to_come_keeps_no_other_out(listener, guests, monkeypatch, error):
    nonce = os.urandom(16)
    guests.enter_context(
        connect(listener.address, 1, nonce, 0, listener.nonce, time.monotonic() + 5)
    )
    real = listener._socket
    failures = [OSError(error, os.strerror(error))]

    def accept():
        if failures:
            raise failures.pop()
        return real.accept()

    monkeypatch.setattr(
        listener, "_socket", SimpleNamespace(accept=accept, close=real.close, fileno=real.fileno)
    )
    assert come(listener, {0: listener.nonce, 1: nonce}) == [1]


def test_without_a_descriptor_guests_wait_and_the_deadline_says_why(listener, guests):
    nonce = os.urandom(16)
    claims = {0: listener.nonce, 1: nonce}
    guests.enter_context(
        connect(listener.address, 1, nonce, 0, listener.nonce, time.monotonic() + 5)
    )
    exchange = SimpleNamespace(rank=0, size=2, deadline=time.monotonic() + 0.2)
    crowd = _Crowd(exchange, listener)
    crowd.claims = [{"address": listener.address}] * 2
    with no_descriptor_left():
        assert listener.serve(0, claims, {1}) == {}
        began = time.process_time()
        with pytest.raises(CommTimeoutError, match=r"rank 1 .*Too many open files"):
            crowd._link(claims)
        assert time.process_time() - began < 0.15  # it does not spin
    assert come(listener, claims) == [1]
    assert listener.trouble == ""
