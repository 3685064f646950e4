"""Finding nodes: a file that changes under us, a store that goes away, arguments that cannot be."""

import json
import threading
from datetime import timedelta

import pytest
import torch
from torch.distributed import HashStore, TCPStore

from sagellm.comm.kv_transfer import KVTransferChannel
from sagellm.comm.kv_transfer.discovery import StaticPeers, StoreDiscovery, discover
from sagellm.core.protocols import ConfigError, PeerLostError, TransferKey

KEY = b"a key of at least 16 bytes"


def test_a_node_written_into_the_file_later_is_found(tmp_path, channel):
    file = tmp_path / "peers.json"
    file.write_text("{}")
    first = channel(node_id=0, peers=file, key=KEY)
    with pytest.raises(ConfigError, match="no node 1; known nodes: none"):
        first.connect(1, 1.0)
    second = channel(node_id=1, peers=file, key=KEY)

    file.write_text(json.dumps({"1": second.address}))

    assert first.connect(1, 10.0).address == second.address


def test_the_event_loop_reads_no_file(tmp_path, channel, monkeypatch):
    file = tmp_path / "peers.json"
    file.write_text("{}")
    first, second = (channel(node_id=i, peers=file, key=KEY) for i in range(2))
    readers, read = [], StaticPeers._read

    def note(path):
        readers.append(threading.current_thread())
        return read(path)

    monkeypatch.setattr(StaticPeers, "_read", staticmethod(note))
    file.write_text(json.dumps({"1": second.address, "0": first.address}))
    t = first.transfer([torch.ones(2)], 1)
    second.receive(None).wait(10)
    t.wait(10)
    second.connect(0, 10.0)
    first.explain(5)
    with pytest.raises(ConfigError, match="no node 5"):
        first.connect(5, 1.0)

    assert readers
    assert not {c._engine.loop._thread for c in (first, second)} & set(readers)


def test_a_file_that_is_being_written_does_no_harm(tmp_path, caplog):
    file = tmp_path / "peers.json"
    file.write_text('{"1": "127.0.0.1:5"}')
    peers = StaticPeers(0, file, KEY)

    file.write_text('{"1": "127.0')
    assert [peers.lookup(1), peers.lookup(1)] == ["127.0.0.1:5"] * 2
    assert caplog.text.count("what was read last holds") == 1

    file.write_text('{"1": "127.0.0.1:6"}')
    assert peers.lookup(1) == "127.0.0.1:6"
    with pytest.raises(ConfigError, match="peers file"):
        StaticPeers(0, tmp_path / "nosuch", KEY)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"key": ""}, "the key has 0 bytes"),
        ({"key": KEY, "key_file": "x"}, "not both"),
        ({"node_id": 0, "peers": {1: "127.0.0.1:5", 2: "127.0.0.1:5"}, "key": KEY}, "1 and 2 are"),
        ({"node_id": 0, "peers": {1: "nowhere"}, "key": KEY}, "'nowhere' is not host:port"),
        ({"node_id": 0, "peers": {-1: "a:1"}, "key": KEY}, "is not id"),
        ({"node_id": 0, "peers": {}, "key": KEY, "store": HashStore()}, "peers= or store="),
        ({"peers": {}, "key": KEY}, "needs node_id="),
        ({"node_id": 0, "peers": {}}, "needs the key"),
        ({"node_id": -1}, "must be 0 or more"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments_that_cannot_be_are_named(arguments, says):
    nothing = dict.fromkeys(("node_id", "peers", "store", "key", "key_file"))

    with pytest.raises(ConfigError, match=says):
        discover(**{**nothing, **arguments})


def test_rubbish_in_torchruns_variables_is_named(monkeypatch):
    for name, value in {
        "RANK": "first", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)

    with pytest.raises(ConfigError, match="RANK='first' and WORLD_SIZE='2'"):
        KVTransferChannel()


def test_ranks_meet_through_a_store_and_a_closed_one_is_gone(channel):
    store = HashStore()
    found = {r: StoreDiscovery(store, r, 2) for r in range(2)}
    assert found[0].key == found[1].key
    assert found[0].known() == [1]
    assert found[0].lookup(1) is None

    found[1].publish("127.0.0.1:7")
    assert found[0].lookup(1) == "127.0.0.1:7"
    found[1].withdraw()

    assert found[0].lookup(1) is None


def test_a_store_that_is_gone_is_an_error_of_ours():
    server = TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5)
    )
    client = TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=5))
    found = StoreDiscovery(client, 0, 2)
    del server

    with pytest.raises(PeerLostError, match="torch's store does not answer"):
        found.lookup(1)
    with pytest.raises(PeerLostError, match="torch's store does not answer"):
        found.publish("127.0.0.1:7")
    found.withdraw()


def test_transfers_find_their_way_through_a_file(tmp_path, channel):
    file = tmp_path / "peers.json"
    file.write_text("{}")
    nodes = [channel(node_id=i, peers=file, key=KEY) for i in range(2)]
    file.write_text(json.dumps({i: node.address for i, node in enumerate(nodes)}))

    nodes[0].transfer([torch.arange(3)], 1, key=TransferKey("k"))
    got = nodes[1].receive(TransferKey("k"), source_node=0).wait(10)

    assert got.blocks[0].tensor.tolist() == [0, 1, 2]
