"""Every plug-in that a distribution declares can be had, and an absent one says how to get it."""

import ast
import importlib.metadata

import pytest

from sagellm.core.protocols import ConfigError
from sagellm.core.protocols.registry import Registry

DECLARED = {
    "sagellm.comm.backends": {"nccl", "rccl", "gloo", "mock", "hccl", "cncl"},
    "sagellm.comm.topology.detectors": {"nvml", "sysfs-net", "sysfs-numa", "sysfs-pci", "npu-smi"},
    "sagellm.comm.kv_transfer.transports": {"tcp"},
    "sagellm.comm.kv_transfer.codecs": {"none", "lz4", "zstd"},
}


def ours(package):
    declared = importlib.metadata.distribution(package.project["name"]).entry_points
    return [e for e in declared if e.group.startswith("sagellm.")]


def test_every_target_loads(package):
    for entry in ours(package):
        loaded = entry.load()

        assert getattr(loaded, "name", entry.name) == entry.name


def test_metadata_is_that_of_the_tree(package):
    written = {
        (group, name, value)
        for group, entries in package.project.get("entry-points", {}).items()
        for name, value in entries.items()
    }

    assert {(e.group, e.name, e.value) for e in ours(package)} == written, "run `nox -s dev` again"


@pytest.mark.parametrize("group", DECLARED)
def test_group_offers_what_is_promised(group):
    names = Registry(group).names()

    assert names
    assert set(names) >= DECLARED[group]


@pytest.mark.parametrize("group", DECLARED)
def test_no_name_is_offered_twice(group, packages):
    names = [e.name for p in packages for e in ours(p) if e.group == group]

    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("group", DECLARED)
def test_unknown_name_lists_the_known(group):
    registry = Registry(group)

    with pytest.raises(ConfigError) as caught:
        registry.load("no_such_plug_in")

    assert all(name in str(caught.value) for name in registry.names())


def test_backend_specs_are_found_without_torch(run_python):
    program = (
        "import sys\n"
        "from sagellm.core.protocols.registry import Registry\n"
        "specs = Registry('sagellm.comm.backends').load_all()\n"
        "print(sorted(specs), 'torch' in sys.modules)"
    )

    names, has_torch = run_python("-c", program).stdout.rsplit(maxsplit=1)

    assert has_torch == "False"
    assert DECLARED["sagellm.comm.backends"] <= set(ast.literal_eval(names))
