"""Compiling the C engine with compilers that can do less than ours."""

import pytest

from sagellm.comm.collective_ops._shm import build

COMPILER = """#!/bin/sh
echo "$@" >> {folder}/calls
case "$*" in
  {accepts}) ;;
  *) echo "error: pragma or attribute 'target(\\"arch=x86-64-v4\\")' is not valid" >&2; exit 1 ;;
esac
while [ "$1" != -o ]; do shift; done
echo library > "$2"
"""


@pytest.fixture
def compile_with(tmp_path, monkeypatch):
    """Compile with a compiler that accepts some command lines; the error and the calls."""

    def run(accepts):
        script = tmp_path / "old-cc"
        script.write_text(COMPILER.format(folder=tmp_path, accepts=accepts))
        script.chmod(0o755)
        monkeypatch.setenv("CC", str(script))
        error = build.compile_library(tmp_path / "made.so")
        return error, (tmp_path / "calls").read_text().splitlines()

    return run


def test_without_function_variants_the_portable_library_is_made(compile_with, tmp_path):
    error, calls = compile_with("*-DSAGE_PORTABLE*")
    assert error is None
    assert ["-DSAGE_PORTABLE" in call for call in calls] == [False, True]
    assert (tmp_path / "made.so").read_text() == "library\n"


def test_a_compiler_that_can_do_all_is_called_once(compile_with):
    error, calls = compile_with("*")
    assert (error, len(calls)) == (None, 1)


def test_a_compiler_that_cannot_leaves_nothing_behind_but_its_words(compile_with, tmp_path):
    error, calls = compile_with("never")
    assert "is not valid" in error
    assert len(calls) == 2
    assert sorted(f.name for f in tmp_path.iterdir()) == ["calls", "old-cc"]
