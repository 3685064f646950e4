"""The vendor table: names, clashes, grades, specs, claims."""

import pytest

from sagellm.comm.domestic import VENDORS, backend_spec, find_vendor
from sagellm.comm.domestic.claims import rate
from sagellm.comm.domestic.vendors import ALIASES, AMBIGUOUS
from sagellm.core.protocols import BackendSpec, ConfigError, DetectorSpec
from sagellm.core.protocols.registry import Registry


def test_rows_are_told_apart_by_vendor_and_library():
    keys = [row.key for row in VENDORS.values()]

    assert len(set(keys)) == len(keys)


def test_no_alias_hides_a_backend_or_another_alias():
    given = [alias for row in VENDORS.values() for alias in row.aliases]

    assert len(set(given)) == len(given)
    assert not set(given) & set(VENDORS)
    assert not set(given) & set(AMBIGUOUS)
    assert set(ALIASES) == set(given)


@pytest.mark.parametrize(
    ("name", "vendor"),
    [
        ("hccl", "huawei"),
        ("HCCL", "huawei"),
        ("mccl", "moorethreads"),
        ("maca", "metax"),
        ("xccl", "kunlun"),
        ("bccl", "biren"),
        ("dcu", "hygon"),
    ],
)
def test_a_name_that_several_could_claim_has_one_owner(name, vendor):
    assert find_vendor(name).vendor == vendor


@pytest.mark.parametrize("name", sorted(AMBIGUOUS))
def test_an_ambiguous_name_says_what_to_say_instead(name):
    with pytest.raises(ConfigError, match="ambiguous"):
        find_vendor(name)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"auto, hccl, cncl.*did you mean 'hccl'"):
        find_vendor("hcl")


@pytest.mark.parametrize("row", VENDORS.values(), ids=list(VENDORS))
def test_every_row_says_that_nobody_ran_it(row):
    assert "unverified" in row.status
    assert (row.status == "unverified") == (row.grade in ("third-party", "unverified"))
    assert row.source
    assert all(claim.source for claim in row.claims)


@pytest.mark.parametrize("row", VENDORS.values(), ids=list(VENDORS))
def test_every_row_becomes_an_installed_spec(row):
    spec = Registry("sagellm.comm.backends").load(row.backend)

    assert isinstance(spec, BackendSpec)
    assert spec.name == row.backend
    assert spec.c10d_name == row.c10d_name
    assert spec.device_types == (row.device,)
    assert not spec.capabilities.verified_on_hardware
    assert not spec.capabilities.reduce_ops & {rule.when for rule in spec.lowering}
    assert not spec.capabilities.dtypes & {rule.when for rule in spec.lowering}
    assert {"band", "bor", "bxor"} <= {rule.when for rule in spec.lowering}
    assert set(spec.options) == set(row.options)
    assert not spec.probe().available


def test_vendors_behind_cuda_come_before_nvidias_backend_and_the_better_known_first():
    priority = {name: backend_spec(row).priority for name, row in VENDORS.items()}

    assert min(priority[n] for n in ("hygon", "kunlun", "metax", "iluvatar")) > priority["hccl"]
    assert priority["hccl"] > priority["cncl"] > priority["mccl"] > priority["tccl"]


def test_xccl_is_no_plug_in_name():
    assert "xccl" not in Registry("sagellm.comm.backends").names()


def test_detectors_are_installed():
    found = Registry("sagellm.comm.topology.detectors").load("npu-smi")

    assert isinstance(found, DetectorSpec)
    assert found.precedence == 40


@pytest.mark.parametrize(
    ("vendor", "part", "measured", "ratio", "words"),
    [
        ("hccl", "910B", 98e9, 0.5, "third-party"),
        ("hccl", "910c roce", 40e9, 0.8, "vendor-document"),
        ("mccl", "MTT S5000", 234e9, None, "direction is not stated"),
        ("cncl", "MLU590", 1e9, None, "nothing is claimed"),
        ("hccl", "310P", 1e9, None, "no claim for '310P', only 910B"),
        ("sccl", "BR100", 1e9, None, "only none"),
    ],
)
def test_efficiency_is_a_ratio_only_where_the_claim_compares(vendor, part, measured, ratio, words):
    found = rate(find_vendor(vendor).claims, part, measured)

    assert found.ratio == (None if ratio is None else pytest.approx(ratio))
    assert words in found.reason
    assert found.measured_bytes_per_s == measured


def test_a_measurement_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="above 0"):
        rate((), "910B", 0.0)
