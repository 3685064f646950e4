"""Whole calls on two ranks over emulated devices: names, lowering, refusals, options."""

import pytest

pytestmark = pytest.mark.usefixtures("emulation")

SOME = ["hccl", "cncl"]
EVERY = ["hccl", "cncl", "mccl", "eccl", "bccl"]


@pytest.mark.parametrize("vendor", EVERY)
def test_two_ranks_reduce_tensors_of_the_vendors_device(pools, vendor):
    seen = pools(vendor).run("all_reduce")
    about = pools(vendor).run("describe")[0]

    assert [s["values"] for s in seen] == [[3.0, 4.0]] * 2
    assert seen[0]["device"] == about["device"].partition(":")[0]
    assert about["name"] == vendor
    assert about["world"] == f"cpu:gloo,{seen[0]['device']}:{vendor}"
    assert about["verified"] is False


@pytest.mark.parametrize("vendor", EVERY)
def test_every_operation_gives_the_right_result(pools, vendor):
    assert pools(vendor).run("self_test") == [[], []]


def test_a_library_that_silently_does_nothing_is_found_out(pools):
    found = pools("hccl").run("broken_self_test")

    assert found == [["all_to_all_single", "all_to_all"]] * 2


@pytest.mark.parametrize("vendor", SOME)
def test_an_average_is_a_sum_and_a_division(pools, vendor):
    pools(vendor).run("library_calls")
    before = pools(vendor).run("lowered_calls")[0].get("all_reduce", 0)
    seen = pools(vendor).run("all_reduce", op="avg")
    after = pools(vendor).run("lowered_calls")[0]["all_reduce"]

    assert seen[0]["values"] == [1.5, 2.0]
    assert pools(vendor).run("library_calls")[0] == ["allreduce"]
    assert after == before + 1


@pytest.mark.parametrize(("dtype", "expected"), [("uint8", [3, 4]), ("bool", [True, True])])
def test_hccl_reduces_narrow_integers_by_way_of_int32(pools, dtype, expected):
    seen = pools("hccl").run("all_reduce", dtype=dtype)

    assert seen[0]["values"] == expected
    assert seen[0]["dtype"] == f"torch.{dtype}"


def test_cncl_reduces_bytes_itself(pools):
    before = pools("cncl").run("lowered_calls")[0].get("all_reduce", 0)

    assert pools("cncl").run("all_reduce", dtype="uint8")[0]["values"] == [3, 4]
    assert pools("cncl").run("lowered_calls")[0]["all_reduce"] == before


def test_an_asynchronous_reduction_gives_the_tensor_itself(pools):
    assert pools("hccl").run("all_reduce", asynchronous=True)[1]["values"] == [3.0, 4.0]


@pytest.mark.parametrize(
    ("vendor", "arguments", "words"),
    [
        ("hccl", {"op": "band", "dtype": "int32"}, "hccl has no band"),
        ("hccl", {"op": "bxor", "dtype": "int32"}, "hccl has no bxor"),
        ("hccl", {"dtype": "float64"}, "cast to float32"),
        ("cncl", {"dtype": "float64"}, "sends float64 as float32"),
        ("cncl", {"dtype": "float64", "method": "broadcast"}, "sends float64 as float32"),
        ("cncl", {"op": "bor", "dtype": "int32"}, "cncl has no bor"),
        ("cncl", {"dtype": "int16"}, "cast to int32"),
        ("eccl", {"dtype": "int64"}, "32 bits"),
    ],
)
def test_what_the_library_lacks_is_refused_by_name_and_the_group_lives_on(
    pools, vendor, arguments, words
):
    for kind, text in pools(vendor).run("refused", **arguments):
        assert kind == "UnsupportedOperationError"
        assert words in text
    assert pools(vendor).run("all_reduce")[0]["values"] == [3.0, 4.0]


def test_a_cpu_tensor_is_refused_before_the_library_sees_it(pools):
    kind, text = pools("hccl").run("refused_cpu_tensor")[0]

    assert kind == "ConfigError"
    assert "npu" in text


def test_kv_blocks_travel_with_their_shapes(pools):
    got = pools("hccl").run("kv_blocks")[1]

    assert got[0] == ["npu:0", "torch.float32", [[1.0, 2.0], [3.0, 4.0]]]
    assert got[1] == ["npu:0", "torch.int32", [5, 6]]


def test_a_ring_of_sends_and_receives_does_not_deadlock(pools):
    assert pools("hccl").run("ring") == [[1.0], [0.0]]


def test_groups_split(pools):
    assert pools("hccl").run("split_both") == [[3.0]] * 2
    assert pools("hccl").run("split_single") == [[1, 0, 7.0], [1, 1, 7.0]]


def test_hccl_options_reach_the_library_and_its_sub_groups(pools):
    wanted = {"hccl_buffer_size": 64, "hccl_algo": "level0:NA;level1:H-D_R"}
    for seen in pools("hccl").run("with_options", options=wanted):
        assert seen["config"] == wanted
        assert seen["sub_config"] == wanted
        assert seen["total"] == seen["sub_total"] == 2.0
        assert not seen["is_default"]


def test_cncl_options_reach_the_library(pools):
    seen = pools("cncl").run("with_options", options={"is_high_priority_stream": True})[0]

    assert seen["priority"] is True


@pytest.mark.parametrize(
    ("vendor", "options", "words"),
    [
        ("hccl", {"hccl_buffer_size": "64"}, "takes int"),
        ("hccl", {"hccl_buffer_size": True}, "takes int"),
        ("hccl", {"hccl_exec_timeout": -1}, "at least 0"),
        ("hccl", {"buffer_size": 64}, "no option buffer_size"),
        ("mccl", {"is_high_priority_stream": True}, "no option is_high_priority_stream"),
    ],
)
def test_options_that_cannot_work_are_refused(pools, vendor, options, words):
    for kind, text in pools(vendor).run("with_options", options=options):
        assert kind == "ConfigError"
        assert words in text


def test_options_for_a_group_that_exists_are_refused(pools):
    options = {"hccl_buffer_size": 64}

    kind, text = pools("hccl").run("options_for_given_group", options=options)[0]
    assert (kind, "only when a group is made" in text) == ("ConfigError", True)

    kind, text = pools("hccl").run("undelivered_options", options=options)[0]
    assert (kind, "did not reach HCCL" in text) == ("ConfigError", True)


def test_a_given_group_is_used_and_left_alone(pools):
    assert pools("hccl").run("given_group") == [[4.0, True]] * 2


def test_a_group_without_the_vendors_library_is_refused(pools):
    kind, text = pools("hccl").run("gloo_group_given")[0]

    assert kind == "ConfigError"
    assert "cpu:gloo,npu:hccl" in text


@pytest.mark.parametrize("vendor", SOME)
def test_auto_takes_the_vendor_that_is_there(pools, vendor):
    assert pools(vendor).run("auto") == [[vendor, 2.0]] * 2


def test_the_hccl_communicator_has_a_name(pools):
    assert pools("hccl").run("comm_name")[0].startswith("emulated_hccl")


def test_a_lost_rank_is_named(own_pool):
    answers = own_pool("hccl").ask("leave")

    kind, text = answers[0]["result"]
    assert answers[1] is None
    assert kind == "PeerLostError"
    assert "lost rank 1" in text
