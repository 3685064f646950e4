"""The contract of `KVTransport` and `KVConnection`: bytes between two ends, in one process."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from sagellm.core.protocols.errors import CommError, CommTimeoutError, PeerLostError
from sagellm.core.protocols.kv_plugins import KVConnection, KVTransport

from .contract import Check, Report, run_local, select
from .targets import factory_of, name_of, resolve

__all__ = ["check_transport", "transport_checks"]

T = TypeVar("T")

_DEADLINE_S = 10.0
_SHORT_S = 0.5
_BOUND_S = 5.0  # what a deadline may take beyond itself on a busy machine


@dataclass(frozen=True, slots=True)
class Transports:
    """What a check gets: a factory of transports."""

    make: Callable[[], KVTransport]

    @contextmanager
    def pair(self) -> Iterator[tuple[KVConnection, KVConnection]]:
        """The connecting and the accepting end of one connection."""
        server, client = self.make(), self.make()
        try:
            token = secrets.token_bytes(16)
            accepted = _Background(lambda: server.accept(token, _DEADLINE_S))
            ours = client.connect(server.endpoint(), token, _DEADLINE_S)
            theirs = accepted.result()
            try:
                yield ours, theirs
            finally:
                ours.close()
                theirs.close()
        finally:
            client.close()
            server.close()


class _Background:
    """A call in a thread, whose result or error is collected later."""

    def __init__(self, call: Callable[[], Any]) -> None:  # Any: whatever the call returns
        self._outcome: list[Any] = []
        self._error: list[BaseException] = []

        def run() -> None:
            try:
                self._outcome.append(call())
            except BaseException as e:
                self._error.append(e)

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def result(self, timeout_s: float = _DEADLINE_S + _BOUND_S) -> Any:  # noqa: ANN401 - as above
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise AssertionError(f"a call did not end within {timeout_s:g} s, past its deadline")
        if self._error:
            raise self._error[0]
        return self._outcome[0]


def _pattern(size: int, salt: int) -> bytes:
    line = bytes((i * 31 + salt * 17) % 251 for i in range(251))
    return (line * (size // 251 + 1))[:size]


def _exchange(source: KVConnection, sink: KVConnection, sizes: Sequence[int]) -> None:
    sent = [_pattern(n, i) for i, n in enumerate(sizes)]
    room = [bytearray(n) for n in sizes]
    receiving = _Background(lambda: sink.receive([memoryview(b) for b in room], _DEADLINE_S))
    calls = source.send([memoryview(b) for b in sent], _DEADLINE_S)
    counts = (calls, receiving.result())
    for i, (a, b) in enumerate(zip(sent, room, strict=True)):
        if a != b:
            first = next(k for k in range(len(a)) if a[k] != b[k])
            raise AssertionError(f"view {i} of {len(a)} bytes differs from byte {first} on")
    if any(not isinstance(n, int) or n < 0 for n in counts):
        raise AssertionError(f"numbers of kernel calls are {counts}")


def _both_ways(t: Transports) -> None:
    with t.pair() as (a, b):
        for source, sink in ((a, b), (b, a)):
            _exchange(source, sink, [1])
            _exchange(source, sink, [10, 0, 4096, 3])
            _exchange(source, sink, [])


def _many_views(t: Transports) -> None:
    """More views than one kernel call takes."""
    with t.pair() as (a, b):
        _exchange(a, b, [7 + i % 5 for i in range(3000)])


def _large(t: Transports) -> None:
    """Both directions at once, each larger than any buffer between them."""
    with t.pair() as (a, b):
        there = _Background(lambda: _exchange(a, b, [8 << 20]))
        _exchange(b, a, [8 << 20])
        there.result()


def _split_differently(t: Transports) -> None:
    """It is a stream: the receiver's views need not be the sender's."""
    with t.pair() as (a, b):
        sent = _pattern(1000, 1)
        cut = [memoryview(sent)[:1], memoryview(sent)[1:900], memoryview(sent)[900:]]
        room = [bytearray(500), bytearray(500)]
        receiving = _Background(lambda: b.receive([memoryview(x) for x in room], _DEADLINE_S))
        a.send(cut, _DEADLINE_S)
        receiving.result()
        if room[0] + room[1] != sent:
            raise AssertionError("bytes changed when the views were cut differently")


def _strangers(t: Transports) -> None:
    """A connection with another token is not handed out."""
    server, client = t.make(), t.make()
    try:
        expected, wrong = secrets.token_bytes(16), secrets.token_bytes(16)
        accepted = _Background(lambda: server.accept(expected, _SHORT_S * 2))

        def intrude() -> None:
            try:
                stranger = client.connect(server.endpoint(), wrong, _SHORT_S * 2)
                stranger.send([memoryview(b"x" * 10)], _SHORT_S)
                stranger.close()
            except CommError:
                return  # to refuse it at once is as good

        _Background(intrude).result()
        try:
            accepted.result()
        except CommError:
            return
        raise AssertionError("accept handed out a connection that presented another token")
    finally:
        client.close()
        server.close()


def _timed(call: Callable[[], object], kind: type[CommError], what: str) -> None:
    started = time.monotonic()
    background = _Background(call)
    try:
        background.result(_SHORT_S + _BOUND_S)
    except kind:
        took = time.monotonic() - started
        if took > _SHORT_S + _BOUND_S:
            raise AssertionError(f"{what} took {took:.1f} s") from None
        return
    raise AssertionError(f"{what} ended without {kind.__name__}")


def _deadlines(t: Transports) -> None:
    with t.pair() as (a, _b):
        room = bytearray(10)
        _timed(lambda: a.receive([memoryview(room)], _SHORT_S), CommTimeoutError,
               "a receive that nothing is sent to")  # fmt: skip
    server = t.make()
    try:
        _timed(lambda: server.accept(secrets.token_bytes(16), _SHORT_S), CommTimeoutError,
               "an accept that nobody connects to")  # fmt: skip
    finally:
        server.close()


def _lost(t: Transports) -> None:
    """A peer that closes, in the middle of what was announced or before."""
    with t.pair() as (a, b):
        a.send([memoryview(b"12345")], _DEADLINE_S)
        a.close()
        room = bytearray(10)
        _timed(lambda: b.receive([memoryview(room)], _DEADLINE_S), PeerLostError,
               "a receive whose peer has closed")  # fmt: skip


def _abort(t: Transports) -> None:
    with t.pair() as (a, _b):
        room = bytearray(10)
        started = threading.Event()

        def receive() -> int:
            started.set()
            return a.receive([memoryview(room)], _DEADLINE_S)

        pending = _Background(receive)
        started.wait(_DEADLINE_S)
        began = time.monotonic()
        a.abort()
        a.abort()
        try:
            pending.result()
        except PeerLostError:
            took = time.monotonic() - began
            if took > _BOUND_S:
                raise AssertionError(f"abort took {took:.1f} s to end a receive") from None
            return
        raise AssertionError("a receive that was aborted ended without PeerLostError")


def _close(t: Transports) -> None:
    transport = t.make()
    endpoint = transport.endpoint()
    if not isinstance(endpoint, str) or not endpoint:
        raise AssertionError(f"endpoint is {endpoint!r}")
    transport.close()
    transport.close()
    with t.pair() as (a, b):
        a.close()
        a.close()
        b.close()


def _several(t: Transports) -> None:
    """Connections of one transport keep apart, whatever the order of accepts."""
    server, client = t.make(), t.make()
    made: list[KVConnection] = []
    try:
        tokens = [secrets.token_bytes(16) for _ in range(3)]
        waiting = [_Background(lambda k=k: server.accept(k, _DEADLINE_S)) for k in tokens]  # type: ignore[misc]  # default binds k
        ends = {k: client.connect(server.endpoint(), k, _DEADLINE_S) for k in reversed(tokens)}
        made += ends.values()
        for i, (token, background) in enumerate(zip(tokens, waiting, strict=True)):
            accepted = background.result()
            made.append(accepted)
            _exchange(ends[token], accepted, [100 + i])
    finally:
        for connection in made:
            connection.close()
        client.close()
        server.close()


def _reached(t: Transports) -> None:
    """A peer's endpoint can be judged without connecting, by whichever host it reached us at."""
    server, client = t.make(), t.make()
    try:
        for endpoint in (server.endpoint(), server.endpoint("127.0.0.1")):
            probe = client.reaches(endpoint)
            if not probe.available:
                raise AssertionError(f"a peer's endpoint {endpoint!r} is refused: {probe.reason}")
    finally:
        client.close()
        server.close()


def _forgotten(t: Transports) -> None:
    """An accept that nobody needs any more ends, at its deadline at the latest."""
    server = t.make()
    try:
        token, other = secrets.token_bytes(16), secrets.token_bytes(16)
        waiting = _Background(lambda: server.accept(token, _SHORT_S))
        server.forget(token)
        server.forget(other)
        try:
            waiting.result(_SHORT_S + _BOUND_S)
        except CommError:
            return
        raise AssertionError("an accept that was forgotten handed out a connection")
    finally:
        server.close()


def transport_checks() -> list[Check]:
    """Every check of the suite, in a stable order."""
    return [
        Check("bytes arrive in both directions", _both_ways),
        Check("many views", _many_views),
        Check("large transfers in both directions at once", _large),
        Check("views may be cut differently", _split_differently),
        Check("several connections keep apart", _several),
        Check("another token is not handed out", _strangers),
        Check("a peer's endpoint is judged", _reached),
        Check("deadlines are kept", _deadlines),
        Check("an accept can be forgotten", _forgotten),
        Check("a lost peer is an error", _lost),
        Check("abort wakes a receiver", _abort),
        Check("close may be repeated", _close),
    ]


def check_transport(
    target: object, *, only: Sequence[str] = (), timeout_s: float | None = None
) -> Report:
    """Run the suite on a transport.

    Args:
        target: `module:attribute`, the name of an entry point, or the class, function or spec.
        only: Patterns of checks' names; empty runs all.
        timeout_s: Longest time for one check; None is the check's own.

    """
    argument = Transports(factory_of(resolve("transport", target)))
    return run_local(
        "transport",
        name_of(target),
        select(transport_checks(), only),
        argument,
        timeout_s=timeout_s,
    )
