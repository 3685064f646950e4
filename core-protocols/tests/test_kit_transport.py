"""The transport suite passes a sound transport, and catches each seeded bug."""

import contextlib
import socket
import threading
import time

import pytest

from sagellm.core.protocols import (
    CommTimeoutError,
    KVConnection,
    KVTransport,
    PeerLostError,
    Probe,
)
from sagellm.core.protocols.ports import PortSettings, SagePorts
from sagellm.core.protocols.testing import check_transport


class Connection(KVConnection):
    def __init__(self, peer):
        self.peer = peer

    def send(self, views, deadline_s):
        with self._errors(deadline_s):
            for view in views:
                self.peer.sendall(view)
        return len(views)

    def receive(self, views, deadline_s):
        calls = 0
        end = time.monotonic() + deadline_s
        for view in views:
            at = 0
            while at < len(view):
                with self._errors(max(0.01, end - time.monotonic())):
                    n = self.peer.recv_into(view[at:])
                calls += 1
                if n == 0:
                    raise PeerLostError("the peer has closed")
                at += n
        return calls

    @contextlib.contextmanager
    def _errors(self, deadline_s):
        try:
            self.peer.settimeout(deadline_s)
            yield
        except TimeoutError:
            raise CommTimeoutError(f"not done within {deadline_s} s") from None
        except OSError as e:
            raise PeerLostError(str(e)) from e

    def abort(self):
        with contextlib.suppress(OSError):
            self.peer.shutdown(socket.SHUT_RDWR)

    def close(self):
        self.abort()
        self.peer.close()


class Tcp(KVTransport):
    connection = Connection

    def __init__(self):
        self.listener = SagePorts(settings=PortSettings()).listen("kit")
        self.waiting = {}
        self.changed = threading.Condition()
        self.reader = threading.Thread(target=self._accept, daemon=True)
        self.reader.start()

    def _accept(self):
        while True:
            try:
                peer, _ = self.listener.accept()
            except OSError:
                return
            peer.settimeout(5)
            try:
                token = peer.recv(16, socket.MSG_WAITALL)
            except OSError:
                peer.close()
                continue
            with self.changed:
                self.waiting[token] = peer
                self.changed.notify_all()

    def endpoint(self, reached_at=""):
        return f"127.0.0.1:{self.listener.getsockname()[1]}"

    def connect(self, endpoint, token, deadline_s):
        host, _, port = endpoint.partition(":")
        peer = socket.create_connection((host, int(port)), timeout=deadline_s)
        peer.sendall(token)
        return self.connection(peer)

    def accept(self, token, deadline_s):
        with self.changed:
            if not self.changed.wait_for(lambda: token in self.waiting, deadline_s):
                raise CommTimeoutError(f"nobody came within {deadline_s} s")
            return self.connection(self.waiting.pop(token))

    def close(self):
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.reader.join(5)
        with self.changed:
            for peer in self.waiting.values():
                peer.close()
            self.waiting.clear()


def transport(connection):
    return type(f"{connection.__name__}Tcp", (Tcp,), {"connection": connection})


class SwappedViews(Connection):
    def send(self, views, deadline_s):
        return super().send(list(views)[::-1], deadline_s)


class FlippedByte(Connection):
    def receive(self, views, deadline_s):
        calls = super().receive(views, deadline_s)
        if views and len(views[-1]) > 1000:
            views[-1][500] ^= 1
        return calls


class ShortReceive(Connection):
    def receive(self, views, deadline_s):
        return super().receive([v[: 1 << 20] for v in views], deadline_s)


class NoDeadline(Connection):
    def receive(self, views, deadline_s):
        return super().receive(views, 3600)


class LostIsTimeout(Connection):
    def receive(self, views, deadline_s):
        try:
            return super().receive(views, deadline_s)
        except PeerLostError as e:
            raise CommTimeoutError(str(e)) from e


class DeafToAbort(Connection):
    def abort(self):
        pass


class Credulous(Tcp):
    def accept(self, token, deadline_s):
        with self.changed:
            if not self.changed.wait_for(lambda: self.waiting, deadline_s):
                raise CommTimeoutError("nobody came")
            return self.connection(self.waiting.pop(next(iter(self.waiting))))


class ForeverAccept(Tcp):
    def accept(self, token, deadline_s):
        return super().accept(token, 3600)


class Shy(Tcp):
    def reaches(self, endpoint):
        return Probe(False, "it is too far")


class OneAddress(Tcp):
    def endpoint(self):
        return super().endpoint()


def test_a_sound_transport_passes():
    report = check_transport(Tcp)

    assert report.ok(reference=True), report.text()


@pytest.mark.parametrize(
    ("bug", "check"),
    [
        (transport(SwappedViews), "bytes arrive*"),
        (transport(FlippedByte), "large*"),
        (transport(ShortReceive), "large*"),
        (transport(NoDeadline), "deadlines*"),
        (transport(LostIsTimeout), "a lost peer*"),
        (transport(DeafToAbort), "abort*"),
        (Credulous, "another token*"),
        (ForeverAccept, "deadlines*"),
        (ForeverAccept, "an accept can be forgotten"),
        (Shy, "a peer's endpoint*"),
        (OneAddress, "a peer's endpoint*"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_seeded_bug_is_caught(bug, check):
    assert not check_transport(bug, only=[check], timeout_s=2).ok()
