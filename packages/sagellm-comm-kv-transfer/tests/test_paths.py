"""Which path leads to a peer, why, and over how many lanes."""

import itertools
import logging
import socket
import sys
import threading
from pathlib import Path

import pytest
import torch

from sagellm.comm.kv_transfer import KVTransferSettings, _lanes, wire
from sagellm.comm.kv_transfer._flows import Outflow, Span
from sagellm.comm.kv_transfer._lanes import LaneTuner
from sagellm.comm.kv_transfer._writer import _Lane
from sagellm.comm.kv_transfer.memory import TensorExtent
from sagellm.comm.kv_transfer.transfer import TransferHandle
from sagellm.comm.kv_transfer.transports import (
    TcpTransport,
    load_spec,
    transport_names,
    transport_registry,
)
from sagellm.comm.kv_transfer.transports.tcp import TcpConnection
from sagellm.core.protocols import (
    BackendUnavailableError,
    CommTimeoutError,
    ConfigError,
    PeerLostError,
    Probe,
    TransferKey,
    TransportSpec,
)


class Bus(TcpTransport):
    """A transport that is preferred, and that fails as the test says."""

    fault = ""

    def connect(self, endpoint, token, deadline_s):
        if self.fault == "connect":
            raise PeerLostError("the bus is broken")
        return super().connect(endpoint, token, deadline_s)

    def reaches(self, endpoint):
        return Probe(self.fault != "reaches", "the bus does not stop there")


@pytest.fixture
def bus(monkeypatch):
    """Registers the transport `bus`, above all others."""

    def load(**arguments):
        if Bus.fault == "load":
            raise BackendUnavailableError("no driver for the bus")
        return Bus(**arguments)

    spec = TransportSpec(
        name="bus",
        priority=99,
        one_sided=False,
        remote_write=False,
        cancel=True,
        integrity=False,
        probe=lambda: Probe(Bus.fault != "probe", "no bus in this machine"),
        load=lambda: load,
    )
    monkeypatch.setattr(Bus, "fault", "")
    transport_registry.add("bus", spec)
    yield Bus
    del transport_registry._loaded["bus"]


TCP_ONLY = {"settings": KVTransferSettings(transport="tcp")}


def moves(out, a, into, b, name="k"):
    t = out.transfer([1, 2], into.node_id, key=TransferKey(name))
    into.receive(TransferKey(name), [3, 4]).wait(10)
    t.wait(10)
    return all(torch.equal(a[n][[1, 2]], b[n][[3, 4]]) for n in a)


def test_the_best_transport_of_both_is_taken(pair, bus):
    out, a, into, b = pair()

    assert moves(out, a, into, b)

    assert out.path(1) == into.path(0) == "bus:1"
    assert "bus:1, chosen" in out.explain(1)


def test_a_transport_that_only_one_side_has_is_not_taken(pair, bus):
    out, a, into, b = pair(receiver=TCP_ONLY)

    assert moves(out, a, into, b)

    assert out.path(1) == "tcp:2"
    assert "bus not taken: the peer has it not" in out.explain(1)
    assert "tcp:2, configured" in into.explain(0)


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("connect", "the bus is broken"),
        ("reaches", "the bus does not stop there"),
        ("probe", "no bus in this machine"),
        ("load", "no driver for the bus"),
    ],
)
def test_a_transport_that_fails_gives_way_and_says_why(pair, bus, caplog, fault, why):
    bus.fault = fault
    out, a, into, b = pair()

    with caplog.at_level(logging.WARNING):
        assert moves(out, a, into, b)

    assert out.path(1) == into.path(0) in ("shm:1", "tcp:2")  # the next best here
    assert why in out.explain(1)
    if fault == "connect":
        assert why in into.explain(0)
        assert why in caplog.text


def test_a_named_transport_is_never_replaced_by_another(pair, channel, bus):
    bus.fault = "connect"
    named = {"settings": KVTransferSettings(transport="bus")}
    out, _, _, _ = pair(sender=named)

    with pytest.raises(CommTimeoutError, match="bus: the bus is broken"):
        out.connect(1, timeout_s=0.3)
    bus.fault = "probe"
    with pytest.raises(BackendUnavailableError, match="no bus in this machine"):
        channel(**named)
    with pytest.raises(ConfigError, match="tcp"):
        channel(settings=KVTransferSettings(transport="tpc"))


def test_a_data_connection_that_fails_for_a_while_is_tried_again(pair, bus):
    """And the link, which the receiver knows of already, is still the same."""
    bus.fault = "connect"
    named = {"settings": KVTransferSettings(transport="bus")}
    out, a, into, b = pair(sender=named)
    r = into.receive(TransferKey("k"), [3, 4], source_node=0)
    t = out.transfer([1, 2], 1, key=TransferKey("k"))
    with pytest.raises(CommTimeoutError, match="bus: the bus is broken"):
        out.connect(1, timeout_s=0.3)

    bus.fault = ""

    t.wait(10)
    r.wait(10)
    assert all(torch.equal(a[n][[1, 2]], b[n][[3, 4]]) for n in a)
    assert "bus not taken" not in out.explain(1)


@pytest.mark.parametrize("lanes", [0, 3])
def test_one_data_connection_is_enough_to_begin_with(pair, monkeypatch, lanes):
    from sagellm.comm.kv_transfer.transports.tcp import TcpTransport

    real, opened = TcpTransport.connect, []

    def connect(self, *args):
        if opened:
            raise PeerLostError("no second one")
        opened.append(real(self, *args))
        return opened[0]

    monkeypatch.setattr(TcpTransport, "connect", connect)
    settings = KVTransferSettings(transport="tcp", lanes=lanes)
    out, a, into, b = pair(sender={"settings": settings})

    assert moves(out, a, into, b)

    assert out.path(1) == "tcp:1"


def test_channels_without_a_common_transport_say_so(pair, bus):
    out, _, _, _ = pair(
        sender=TCP_ONLY,
        receiver={"settings": KVTransferSettings(transport="bus")},
    )

    with pytest.raises(ConfigError, match="tcp: the peer has it not"):
        out.connect(1, timeout_s=5)


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("pull", [False, True])
def test_much_goes_over_all_lanes_and_little_over_one(pair, eventually, lanes, pull):
    fixed = {"settings": KVTransferSettings(transport="tcp", lanes=lanes, chunk_bytes=1 << 16)}
    out, a, into, b = pair(blocks=600, sender=fixed, receiver=fixed, page=32, dim=32)
    used = {}

    def spy(c):
        for link in c._engine.links:
            for i, conn in enumerate(link.lanes):
                send = conn.send

                def count(views, deadline_s, send=send, i=i):
                    used[i] = used.get(i, 0) + 1
                    return send(views, deadline_s)

                conn.send = count

    def move(name, ids):
        if pull:
            out.offer(TransferKey(name), ids, num_tokens=1, ttl_s=10)
            into.fetch(TransferKey(name), out.node_id, ids).wait(10)
        else:
            t = out.transfer(ids, into.node_id, key=TransferKey(name))
            into.receive(TransferKey(name), ids).wait(10)
            t.wait(10)

    move("meet", [0])
    spy(out)
    eventually(lambda: all(x.asleep for k in out._engine.links for x in k.writer._lanes))
    move("little", [1])
    assert len(used) == 1
    ids = torch.randperm(600)[:500].numpy()
    move("much", ids)

    assert sorted(used) == list(range(lanes))
    assert all(torch.equal(a[n][ids], b[n][ids]) for n in a)
    assert out.path(into.node_id) == f"tcp:{lanes}"


def test_a_lost_lane_is_a_lost_link_and_the_next_transfer_redials(pair, eventually):
    out, a, into, b = pair(sender=TCP_ONLY, receiver=TCP_ONLY)
    assert moves(out, a, into, b)
    (link,) = out._engine.links

    link.lanes[1]._sock.shutdown(socket.SHUT_RDWR)

    eventually(lambda: link.error is not None)
    assert isinstance(link.error, PeerLostError)
    assert moves(out, a, into, b, "again")


def test_what_a_peer_said_before_it_broke_a_lane_is_why(pair, eventually):
    out, a, into, b = pair()
    assert moves(out, a, into, b)
    eventually(lambda: not into.snapshot()["transfers"])  # the last that was to be said has come
    (link,) = into._engine.links

    def both():  # on the loop, as when the thread of a lane is faster than the control socket
        (theirs,) = out._engine.links
        out._engine.loop.run(lambda: theirs.send(wire.Bye("for lunch")))
        while out._engine.loop.run(lambda: theirs.unread_bytes):
            pass  # it goes at the end of a turn
        link._lane_lost(PeerLostError("the lane is closed"))

    into._engine.loop.run(both)

    assert "has ended the link: for lunch" in str(link.error)


def test_a_side_that_gives_a_link_up_tells_the_other_why(pair, eventually):
    out, a, into, b = pair()
    assert moves(out, a, into, b)
    (ours,), (theirs,) = out._engine.links, into._engine.links

    out._engine.loop.run(lambda: ours.lose(PeerLostError("nonsense was said")))

    eventually(lambda: theirs.error is not None)
    assert str(theirs.error) == "node 0 has ended the link: nonsense was said"


def test_lanes_are_added_while_much_flows(pair, eventually):
    """Either side may ask for them: the one that sends, whichever it is."""
    out, a, into, b = pair(sender=TCP_ONLY, receiver=TCP_ONLY)
    assert moves(out, a, into, b)
    links = [*out._engine.links, *into._engine.links]

    for link, engine in zip(links, (out._engine, into._engine), strict=True):
        before = len(link.lanes)
        engine.loop.run(lambda e=engine, k=link, n=before: e.links.data.want(k, n + 1))
        eventually(lambda n=before: all(len(k.lanes) == n + 1 for k in links))

    assert len(links[0].lanes) == 4
    for link in links:
        link.writer.tuner.lanes = 4
    assert out.path(1) == into.path(0) == "tcp:4"
    assert moves(out, a, into, b, "over four")


def test_a_lane_that_fails_to_open_is_done_without(pair, monkeypatch, eventually):
    out, a, into, b = pair(sender=TCP_ONLY, receiver=TCP_ONLY)
    assert moves(out, a, into, b)
    (link,) = out._engine.links

    def refuse(endpoint, token, deadline_s):
        raise PeerLostError("no more")

    monkeypatch.setattr(out._engine.paths["tcp"], "connect", refuse)
    link.writer.tuner.lanes = 3
    out._engine.loop.run(lambda: out._engine.links.data.want(link, 3))

    eventually(lambda: out.path(1) == "tcp:2")
    assert moves(out, a, into, b, "still")


def climb(rate_of, start, most, windows=400):
    tuner = LaneTuner(start, most)
    spent = []
    for _ in range(windows):
        spent.append(tuner.lanes)
        tuner.measured(rate_of(tuner.lanes))
        assert 1 <= tuner.lanes <= most
    return spent


@pytest.mark.parametrize("best", [1, 2, 3, 4])
def test_the_tuner_finds_the_best_number_of_lanes(best):
    spent = climb(lambda n: 10.0 - 2 * abs(n - best), 2, 4)

    late = spent[100:]
    assert late.count(best) > 0.9 * len(late)


def test_the_tuner_leaves_what_makes_no_difference():
    assert climb(lambda n: 5.0, 2, 4).count(2) > 360


@pytest.mark.parametrize("cpus", [1, 2, 3])
def test_within_a_host_no_more_lanes_are_used_than_there_are_cpus(pair, monkeypatch, cpus):
    monkeypatch.setattr("os.cpu_count", lambda: cpus)
    tcp = {"settings": KVTransferSettings(transport="tcp")}
    out, _, into, _ = pair(sender=tcp, receiver=tcp)
    out.connect(into.node_id)
    (link,) = out._engine.links
    rates = itertools.count(1)

    lanes = {link.writer.tuner.measured(2.0 ** next(rates)) for _ in range(50)}

    assert max(lanes) == cpus
    assert min(lanes) == min(2, cpus), "one lane alone leaves CPUs idle"


@pytest.mark.skipif(not hasattr(socket, "TCP_CONGESTION"), reason="the system has one only")
def test_nothing_paces_what_stays_within_a_host(pair):
    tcp = {"settings": KVTransferSettings(transport="tcp")}
    out, _, into, _ = pair(sender=tcp, receiver=tcp)
    out.connect(into.node_id)

    (link,) = out._engine.links
    for conn in link.lanes:
        name = conn._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
        assert name.rstrip(b"\0") == b"reno"


def test_the_tuner_never_changes_what_was_fixed():
    tuner = LaneTuner(3, 3, fixed=True)
    tuner.enough(1)

    assert {tuner.measured(float(i)) for i in range(50)} == {3}


@pytest.mark.parametrize("pull", [False, True])
def test_measured_rates_open_lanes_while_blocks_flow(pair, monkeypatch, eventually, pull):
    """Whichever side sends is the one that measures; the side that dialled opens."""
    monkeypatch.setattr(_lanes, "_WINDOW_BYTES", 1 << 16)
    monkeypatch.setattr(_lanes, "_REST", 1)
    monkeypatch.setattr(TcpConnection, "most_lanes", None)  # as between hosts
    rates = []

    def measured(tuner, rate):
        rates.append(rate)
        tuner.lanes = 4
        return 4

    monkeypatch.setattr(LaneTuner, "measured", measured)
    tcp = {"settings": KVTransferSettings(transport="tcp", chunk_bytes=1 << 16)}
    out, a, into, b = pair(blocks=100, sender=tcp, receiver=tcp, page=32, dim=32)
    ids = list(range(100))
    names = itertools.count()

    def grown():
        name = f"k{next(names)}"
        if pull:
            out.offer(TransferKey(name), ids, num_tokens=1, ttl_s=10)
            into.fetch(TransferKey(name), out.node_id, ids).wait(10)
        else:
            t = out.transfer(ids, into.node_id, key=TransferKey(name))
            into.receive(TransferKey(name), ids).wait(10)
            t.wait(10)
        return out.path(into.node_id) == "tcp:4"

    eventually(grown)

    assert all(rate > 0 for rate in rates)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert {len(k.lanes) for c in (out, into) for k in c._engine.links} == {4}


def test_the_readme_says_what_each_transport_states():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    header = "| name | priority |"
    lines = text[text.index(header) :].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    told = {row[0].strip("`"): row for row in rows}
    assert set(told) == set(transport_names())
    for name, row in told.items():
        spec = load_spec(name)
        stated = [spec.one_sided, spec.remote_write, spec.cancel, spec.integrity]
        assert [cell.split()[0] == "yes" for cell in row[4:8]] == stated, name
        assert int(row[1]) == spec.priority
        assert row[3].split(",")[0] == str(spec.start_lanes)


@pytest.mark.parametrize("transport", ["tcp", "shm"])
@pytest.mark.parametrize("early", [False, True])
def test_an_accept_that_nobody_needs_any_more_ends_at_once(transport, early, eventually):
    made = load_spec(transport).load()()
    failed = []

    def accept():
        try:
            made.accept(b"t" * 32, 30)
        except PeerLostError as e:
            failed.append(e)

    thread = threading.Thread(target=accept)
    if early:
        made.forget(b"t" * 32)
    thread.start()
    if not early:
        eventually(lambda: waits(thread))
        made.forget(b"t" * 32)
    thread.join(10)

    assert "nobody wants it" in str(failed[0])
    made.close()


def test_no_thread_waits_for_lanes_of_a_transport_that_failed(pair, bus, eventually):
    bus.fault = "connect"
    out, a, into, b = pair()
    assert moves(out, a, into, b)

    eventually(lambda: not any("-in-" in t.name and waits(t) for t in threading.enumerate()), 2)


def waits(thread):
    frame = sys._current_frames().get(thread.ident)
    while frame is not None:
        if frame.f_code.co_name == "accept":
            return True
        frame = frame.f_back
    return False


def spans_of(total, lanes, first=4, most=16):
    """Blocks per frame of a transfer of so many blocks of one byte."""
    flow = Outflow(TransferHandle(TransferKey("k"), "send", 10, lambda _: False), 1)
    flow.extent = TensorExtent([torch.zeros(total, dtype=torch.uint8)], 1)
    flow.queue([Span(0, 0, total)])
    sizes = []
    while (chunk := flow.claim(first, most, lanes)) is not None:
        sizes.append(chunk.units)
    return sizes


def test_frames_grow_with_the_transfer_and_shrink_where_lanes_share_its_end():
    one, two = spans_of(128, 1), spans_of(128, 2)

    assert sum(one) == sum(two) == 128
    assert one[:4] == two[:4] == [4, 4, 8, 16]
    assert one[-1] == max(one) == max(two) == 16
    assert two[-2:] == [4, 4]


def test_frames_take_as_long_as_others_may_wait():
    lane = _Lane(None, 16 << 20, threading.Lock())
    assert lane.chunk_bytes == 16 << 20

    lane.pace(4 << 20, 32.0)  # 1 Mbit/s
    slow = lane.chunk_bytes
    for _ in range(20):
        lane.pace(lane.chunk_bytes, lane.chunk_bytes / 2e9)

    assert slow == 1 << 18
    assert lane.chunk_bytes == 16 << 20
    lane.pace(16 << 20, 0.1)
    assert 3 << 20 < lane.chunk_bytes < 5 << 20
