"""Every vendor's rules over gloo on CPU tensors: runs on any torch."""

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
