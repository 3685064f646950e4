"""Our detectors keep the contract that every detector is held to."""

import pytest

from sagellm.core.protocols.testing.__main__ import main


@pytest.mark.parametrize("name", ["nvml", "sysfs-net", "sysfs-numa", "sysfs-pci", "kfd"])
def test_the_contract_holds(name, capsys):
    assert main(["--detector", name, "--reference"]) == 0, capsys.readouterr().out
