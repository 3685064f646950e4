"""The manager keeps the contract that every overlap manager is held to."""

from sagellm.core.protocols.testing.__main__ import main


def test_the_contract_holds(capsys):
    arguments = ["--overlap-manager", "sagellm.comm.overlap:OverlapManager", "--reference"]

    assert main(arguments) == 0, capsys.readouterr().out
