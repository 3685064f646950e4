"""The shared contract suites, and the example as a reader would start it."""

import runpy
from pathlib import Path

import pytest

from sagellm.core.protocols.testing.__main__ import main

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    "arguments",
    [
        ["--codec", "lz4", "--reference"],
        ["--codec", "zstd", "--reference"],
        ["--codec", "none", "--reference"],
        ["--codec", "lz4-planes", "--reference"],
        ["--codec", "zstd-planes", "--reference"],
        ["--codec", "lossless", "--reference"],
        ["--codec", "lossless-fast", "--reference"],
        ["--transport", "tcp", "--reference"],
        ["--transport", "shm", "--reference"],
    ],
)
def test_the_contract_holds(arguments, capsys):
    assert main(arguments) == 0, capsys.readouterr().out


def test_the_example_runs(capsys):
    runpy.run_path(str(HERE.parent / "examples" / "prefill_to_decode.py"), run_name="__main__")

    assert "equal: True" in capsys.readouterr().out
