"""A shaped link of two namespaces: its rate holds, and it can be cut and restored."""

import os
import socket
import threading
import time

import pytest

from sagellm.core.protocols.netns import ShapedHosts, enter_namespace, why_not

REASON = why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def in_namespace(pid, call):
    """Run `call` on a thread of its own in the network of a process."""
    answer = []

    def body():
        enter_namespace(pid)
        answer.append(call())

    thread = threading.Thread(target=body)
    thread.start()
    thread.join(20)
    assert answer, "the call in the namespace failed or hangs"
    return answer[0]


def test_the_link_has_the_rate_it_was_given_last_and_comes_back_after_a_cut():
    before = len(os.listdir("/proc/self/fd"))
    with ShapedHosts("1gbit") as hosts:
        hosts.shape("40mbit")
        server = in_namespace(hosts.pids[1], lambda: socket.create_server((hosts.addresses[1], 0)))
        where = server.getsockname()
        with server:
            hosts.cut()
            hosts.restore()
            near = in_namespace(hosts.pids[0], lambda: socket.create_connection(where, 15))
            far, _ = server.accept()
            with near, far:
                sending = threading.Thread(target=near.sendall, args=(bytes(2_000_000),))
                started = time.monotonic()
                sending.start()
                left = 2_000_000
                while left:
                    left -= len(far.recv(1 << 16))
                seconds = time.monotonic() - started
                sending.join(10)

    assert 0.2 < seconds < 5  # 0.4 s at 40 Mbit/s, less what the burst lets through
    assert len(os.listdir("/proc/self/fd")) == before
