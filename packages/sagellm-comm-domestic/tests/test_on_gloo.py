"""Vendors' rules, adapter, groups and self-test over gloo on CPU tensors: runs on any torch."""

import pytest

from sagellm.comm.domestic import VENDORS


@pytest.mark.parametrize("name", sorted(VENDORS))
def test_a_vendors_rules_hold_between_two_ranks(pools, name):
    row = VENDORS[name]

    for seen in pools("cpu").run("lowering_on_cpu", name=name):
        assert seen["avg"] == (None if "avg" in row.reduce_ops else 1.5)
        assert seen["lowered"] == ({} if "avg" in row.reduce_ops else {"all_reduce": 1})
        assert seen["band"][0] == "UnsupportedOperationError"
        assert (seen["float64"] is None) == ("float64" in row.reduce_dtypes)
        if name == "hccl":
            assert (seen["uint8"], seen["bool"]) == ([1], [True])


@pytest.mark.parametrize("name", ["hccl", "mccl"])
def test_every_operation_passes_the_self_test(pools, name):
    assert pools("cpu").run("self_test_on_cpu", name=name) == [[], []]


@pytest.mark.parametrize(
    ("broken", "wrong"),
    [
        ("all_reduce", ["all_reduce"]),
        ("all_to_all_single", ["all_to_all_single", "all_to_all"]),
        ("broadcast", ["broadcast"]),
        ("all_gather_into_tensor", ["all_gather_into_tensor", "all_gather"]),
    ],
)
def test_an_operation_that_silently_does_nothing_is_found_out(pools, broken, wrong):
    seen = pools("cpu").run("self_test_on_cpu", name="hccl", broken=broken)

    # The root of a broadcast holds the right values whatever the library does.
    assert seen == ([wrong, []] if broken == "broadcast" else [wrong, wrong])


def test_the_adapter_tells_the_vendors_facts(pools):
    seen = pools("cpu").run("adapter_on_cpu")[0]

    assert seen["class"] == "HCCLBackend"
    assert seen["about"] == ["huawei", "HCCL", "npu"]
    assert seen["claims"] == 4
    assert seen["ratio"] == 0.5
    assert seen["split"] == ["HCCLBackend", 2.0]


def test_a_group_made_for_a_backend_that_cannot_be_made_is_closed(pools):
    assert pools("cpu").run("adapter_that_cannot_be_made") == [["ConfigError", 1, True]] * 2


def test_groups_are_found_made_and_refused(own_pool):
    for seen in own_pool("cpu").run("groups_on_meta"):
        assert seen["why"][0] == "RANK, WORLD_SIZE and MASTER_ADDR"
        assert seen["why"][1:] == ["torch's default group", "the given group", "split as 'both'"]
        assert seen["owned"] == [True, False, False, True]
        assert seen["map"] == {"cpu": "gloo", "meta": "gloo"}
        assert seen["sum"] == 2.0
        assert seen["late"][0] == "ConfigError"
        assert "only when a group is made" in seen["late"][1]
        assert seen["options"][0] == "BackendUnavailableError"
        assert "torch_npu" in seen["options"][1]
        assert "has no xpu:xccl" in seen["other"][1]
        assert seen["library"][0] == "DistributedRuntimeError"
        assert "cpu:gloo,meta:nosuch" in seen["library"][1]
