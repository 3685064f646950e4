"""Our backends keep the contract that every backend is held to, a vendor's too."""

import pytest

from sagellm.core.protocols.testing.__main__ import main


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["gloo", "hier", "mock", "shm"])
def test_the_contract_holds(name, capsys):
    arguments = ["--backend", name, "--world-size", "2", "--reference"]

    assert main(arguments) == 0, capsys.readouterr().out
