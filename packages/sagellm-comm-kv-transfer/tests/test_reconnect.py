"""Links that are lost and found again: either side may restart, in any order."""

import itertools
import socket

import pytest
import torch

from sagellm.comm.kv_transfer.transports.tcp import parse_address
from sagellm.core.protocols import TransferKey

KEY = b"a key of this test, long enough"


class Nodes:
    """Two nodes at fixed addresses, each of which can be stopped and started."""

    def __init__(self, channel, layout, tensors):
        self.turn = itertools.count()
        self.channel, self.layout, self.tensors = channel, layout, tensors
        self.ports, self.up, self.data = {}, {}, {}
        for node in (0, 1):
            self.start(node)

    def start(self, node):
        c = self.channel(node_id=node, peers={}, key=KEY, port=self.ports.get(node, 0))
        self.ports[node] = parse_address(c.address)[1]
        self.data[node] = self.tensors(self.layout())
        c.register(self.layout(), self.data[node])
        self.up[node] = c
        for a, b in ((0, 1), (1, 0)):
            if a in self.up and b in self.ports:
                self.up[a].add_peer(b, f"127.0.0.1:{self.ports[b]}")

    def stop(self, node):
        self.up.pop(node).close()

    def send(self, source):
        """Begin to move a block from one to the other."""
        key = TransferKey(f"k{next(self.turn)}")
        return key, self.up[source].transfer([1], 1 - source, key=key, deadline_s=20)

    def land(self, source, key, sent):
        self.up[1 - source].receive(key, [2], deadline_s=20).wait(20)
        sent.wait(20)
        ours, theirs = self.data[source], self.data[1 - source]
        return all(torch.equal(ours[n][1], theirs[n][2]) for n in ours)


@pytest.fixture
def nodes(channel, layout, tensors):
    return Nodes(channel, layout, tensors)


@pytest.mark.parametrize("order", [(0,), (1,), (0, 1), (1, 0)])
def test_both_directions_work_after_restarts_in_any_order(nodes, eventually, order):
    for source in (0, 1):
        assert nodes.land(source, *nodes.send(source))

    for node in order:
        nodes.stop(node)
    for left in nodes.up.values():
        eventually(lambda c=left: c.path(1 - c.node_id) == "unconnected")
    for node in order:
        nodes.start(node)

    for source in (0, 1):
        assert nodes.land(source, *nodes.send(source))


@pytest.mark.parametrize("source", [0, 1])
def test_a_transfer_waits_for_a_peer_that_restarts(nodes, eventually, source):
    assert nodes.land(source, *nodes.send(source))
    target = 1 - source
    nodes.stop(target)
    eventually(lambda: nodes.up[source].path(target) == "unconnected")

    key, sent = nodes.send(source)
    eventually(lambda: "refused" in nodes.up[source].explain(target))
    nodes.start(target)

    assert nodes.land(source, key, sent)


@pytest.mark.parametrize("side", [0, 1])
def test_a_control_connection_that_breaks_is_dialled_again(nodes, eventually, side):
    assert nodes.land(0, *nodes.send(0))
    (link,) = nodes.up[side]._engine.links

    link._sock.shutdown(socket.SHUT_RDWR)
    eventually(lambda: all(c.path(1 - c.node_id) == "unconnected" for c in nodes.up.values()))

    assert nodes.land(0, *nodes.send(0))
    assert nodes.up[0].get_stats().peers == nodes.up[1].get_stats().peers == 1
