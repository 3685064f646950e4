"""What peers are told of where a channel listens."""

import pytest
import torch

from sagellm.comm.kv_transfer import _address
from sagellm.comm.kv_transfer._address import advertised_host, is_loopback
from sagellm.comm.kv_transfer.transports.tcp import parse_address
from sagellm.core.protocols import ConfigError, TransferKey

KEY = b"a key of this test, long enough"
OUTSIDE = _address._address_towards("192.0.2.1", None)
outside = pytest.mark.skipif(
    OUTSIDE is None or is_loopback(OUTSIDE), reason="no interface but loopback"
)


def test_loopback_is_known_by_any_name():
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost", "LocalHost.")))
    assert not any(map(is_loopback, ("10.0.0.1", "fe80::1", "node3.example", "0.0.0.0", "")))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.7"])
@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "::1"])
def test_loopback_is_never_told_to_other_hosts(host, name):
    with pytest.raises(ConfigError, match="every other host to itself"):
        advertised_host(host, name)


def test_ranks_on_other_hosts_are_not_told_loopback():
    apart = {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}
    together = {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}

    with pytest.raises(ConfigError, match=r"8 of 16 ranks are on this host.*0\.0\.0\.0"):
        advertised_host("127.0.0.1", None, environment=apart)

    assert advertised_host("127.0.0.1", None, environment=together) == "127.0.0.1"
    assert advertised_host("10.0.0.7", None, environment=apart) == "10.0.0.7"
    assert advertised_host("0.0.0.0", "node3.example", environment=apart) == "node3.example"


def test_a_wildcard_is_told_as_the_interface_that_leads_to_the_peers(monkeypatch):
    ways = {"10.1.0.9": "10.1.0.1", "10.2.0.9": "10.2.0.1", "192.0.2.1": "172.16.0.1"}
    ways["127.0.0.1"] = "127.0.0.1"
    monkeypatch.setattr(_address, "_address_towards", lambda target, wanted: ways.get(target))

    assert advertised_host("0.0.0.0", None, ["10.2.0.9:80", "10.1.0.9:80"]) == "10.2.0.1"
    assert advertised_host("0.0.0.0", None, ["127.0.0.1:80"], {}) == "172.16.0.1"
    assert advertised_host("::", None, [], {"MASTER_ADDR": "10.1.0.9"}) == "10.1.0.1"


def test_without_a_way_to_other_hosts_a_wildcard_is_refused(monkeypatch):
    monkeypatch.setattr(_address, "_address_towards", lambda target, wanted: None)

    with pytest.raises(ConfigError, match="give advertise="):
        advertised_host("0.0.0.0", None, ["10.2.0.9:80"], {})


@outside
def test_a_channel_that_listens_everywhere_is_reached_by_what_it_tells(channel):
    into = channel(node_id=1, peers={}, key=KEY, host="0.0.0.0")
    out = channel(node_id=0, peers={1: into.address}, key=KEY)
    told = parse_address(into.address)[0]

    t = out.transfer([torch.ones(1000)], 1, key=TransferKey("k"))
    r = into.receive(TransferKey("k")).wait(10)
    t.wait(10)

    assert told == OUTSIDE
    assert torch.equal(r.blocks[0].tensor, torch.ones(1000))


@outside
def test_data_connections_go_where_the_peer_has_reached_us(channel):
    """The same listener is known by several addresses; each peer uses the one it came by."""
    into = channel(node_id=1, peers={}, key=KEY, host="0.0.0.0")
    port = parse_address(into.address)[1]
    out = channel(node_id=0, peers={1: f"127.0.0.1:{port}"}, key=KEY)

    out.connect(1, timeout_s=10)

    (link,) = out._engine.links
    assert parse_address(link.endpoints["tcp"])[0] == "127.0.0.1"
