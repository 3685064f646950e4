"""The vendors' detectors keep the contract that every detector is held to."""

import pytest

from sagellm.core.protocols.testing.__main__ import main


@pytest.mark.parametrize("name", ["mthreads-gmi", "mx-smi", "npu-smi", "xpu-smi"])
def test_the_contract_holds(name, capsys):
    assert main(["--detector", name, "--reference"]) == 0, capsys.readouterr().out
