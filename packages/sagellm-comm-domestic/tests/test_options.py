"""Options are checked, built in the vendor's own class, or refused."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from sagellm.comm.domestic import find_vendor
from sagellm.comm.domestic.options import build_pg_options, delivered_options, vendor_options
from sagellm.core.protocols import BackendUnavailableError, ConfigError


class Options:
    """What a plug-in's class of options looks like."""

    def __init__(self):
        self.hccl_config = {}
        self.is_high_priority_stream = False


@pytest.fixture
def plugins(monkeypatch):
    """Modules of the names that the rows of Ascend and Cambricon give."""
    for name, group in (
        ("torch_npu._C._distributed_c10d", "ProcessGroupHCCL"),
        ("torch_mlu._MLUC", "ProcessGroupCNCL"),
    ):
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            module = ModuleType(".".join(parts[:depth]))
            monkeypatch.setitem(sys.modules, module.__name__, module)
        setattr(module, group, SimpleNamespace(Options=Options))


def test_options_become_the_vendors_own_object(plugins):
    wanted = {"hccl_buffer_size": 64, "hccl_algo": "level0:NA"}

    ascend = build_pg_options(find_vendor("hccl"), wanted)
    cambricon = build_pg_options(find_vendor("cncl"), {"is_high_priority_stream": True})

    assert type(ascend) is type(cambricon) is Options
    assert ascend.hccl_config == wanted
    assert cambricon.is_high_priority_stream is True
    held = SimpleNamespace(options=ascend), SimpleNamespace(options=cambricon)
    assert delivered_options(find_vendor("hccl"), held[0]) == wanted
    assert delivered_options(find_vendor("cncl"), held[1]) == {"is_high_priority_stream": True}


def test_nothing_to_deliver_needs_no_plug_in():
    assert build_pg_options(find_vendor("hccl"), {}) is None


def test_a_library_that_does_not_show_its_options_is_not_believed():
    hidden = SimpleNamespace(options=SimpleNamespace())

    assert delivered_options(find_vendor("hccl"), SimpleNamespace()) is None
    assert delivered_options(find_vendor("hccl"), hidden) is None
    assert delivered_options(find_vendor("cncl"), hidden) is None


def test_a_plug_in_without_the_class_is_named():
    with pytest.raises(BackendUnavailableError, match="options hccl_algo cannot reach HCCL"):
        build_pg_options(find_vendor("hccl"), {"hccl_algo": "level0:NA"})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"hccl_buffer_size": "64"}, "takes int"),
        ({"hccl_buffer_size": True}, "takes int"),
        ({"hccl_exec_timeout": -1}, "at least 0"),
    ],
)
def test_values_that_the_library_does_not_take_are_refused(options, says):
    with pytest.raises(ConfigError, match=says):
        vendor_options(find_vendor("hccl"), options)


def test_options_of_others_are_left_to_them():
    assert vendor_options(find_vendor("mccl"), {"check_calls": True, "hccl_algo": "x"}) == {}
