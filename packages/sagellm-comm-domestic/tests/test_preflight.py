"""Settings that would make a library hang or fail later."""

import pytest

from sagellm.comm.domestic import preflight
from sagellm.comm.domestic.preflight import local_addresses
from sagellm.core.protocols import ConfigError

HERE = {"lo": ("127.0.0.1",), "eth0": ("10.0.0.5",), "ib0": ()}


def variables(name, env, addresses=HERE):
    return [(f.severity, f.variable) for f in preflight(name, env, addresses=lambda: addresses)]


def test_nothing_set_for_ascend_is_fine():
    assert preflight("hccl", {}, addresses=lambda: HERE) == ()


@pytest.mark.parametrize(
    ("env", "found"),
    [
        ({"HCCL_IF_IP": "10.0.0.5"}, []),
        ({"HCCL_IF_IP": "10.0.0.6"}, [("error", "HCCL_IF_IP")]),
        ({"HCCL_IF_IP": "eth0"}, [("error", "HCCL_IF_IP")]),
        ({"HCCL_IF_IP": "fe80::1"}, []),
        ({"HCCL_SOCKET_IFNAME": "eth"}, []),
        ({"HCCL_SOCKET_IFNAME": "bond0,enp"}, [("error", "HCCL_SOCKET_IFNAME")]),
        ({"HCCL_SOCKET_IFNAME": "^lo"}, []),
        ({"RANK_TABLE_FILE": "table.json"}, [("error", "RANK_TABLE_FILE")]),
        ({"RANK_TABLE_FILE": "/no/such/table.json"}, [("error", "RANK_TABLE_FILE")]),
        ({"HCCL_CONNECT_TIMEOUT": "soon"}, [("error", "HCCL_CONNECT_TIMEOUT")]),
        ({"HCCL_CONNECT_TIMEOUT": "30"}, [("warning", "HCCL_CONNECT_TIMEOUT")]),
        ({"HCCL_CONNECT_TIMEOUT": "600"}, []),
        ({"HCCL_EXEC_TIMEOUT": "0"}, [("warning", "HCCL_EXEC_TIMEOUT")]),
        ({"ASCEND_RT_VISIBLE_DEVICES": "0,1,1"}, [("error", "ASCEND_RT_VISIBLE_DEVICES")]),
        ({"ASCEND_RT_VISIBLE_DEVICES": ""}, [("warning", "ASCEND_RT_VISIBLE_DEVICES")]),
    ],
)
def test_what_ascend_would_trip_over_is_found(env, found):
    assert variables("hccl", env) == found


def test_a_rank_table_that_exists_is_fine(tmp_path):
    table = tmp_path / "table.json"
    table.write_text("{}")

    assert variables("hccl", {"RANK_TABLE_FILE": str(table)}) == []


def test_contradicting_device_lists_are_found_and_the_winner_named():
    env = {"XPU_VISIBLE_DEVICES": "0,1", "CUDA_VISIBLE_DEVICES": "2,3"}
    (finding,) = preflight("kunlun", env)

    assert finding.variable == "XPU_VISIBLE_DEVICES"
    assert "wins" in finding.message
    assert preflight("kunlun", {**env, "CUDA_VISIBLE_DEVICES": "0, 1"}) == ()


def test_cncl_without_a_watchdog_is_a_warning():
    assert variables("cncl", {}) == [("warning", "CNCL_ASYNC_ERROR_HANDLING")]
    assert variables("cncl", {"CNCL_ASYNC_ERROR_HANDLING": "1"}) == []


def test_unknown_interfaces_accuse_nobody():
    env = {"HCCL_IF_IP": "10.9.9.9", "HCCL_SOCKET_IFNAME": "bond0"}
    assert variables("hccl", env, addresses=None) == []


def test_this_hosts_addresses_can_be_read():
    found = local_addresses()

    assert found is None or "127.0.0.1" in {a for group in found.values() for a in group}


def test_an_unknown_vendor_is_refused():
    with pytest.raises(ConfigError):
        preflight("nobody")
