"""A library that cannot be the compiled engine is left out, said once, and never loaded."""

import logging
from pathlib import Path

import numpy
import pytest

from sagellm.comm.collective_ops._shm import build, native_library
from sagellm.comm.collective_ops._shm.native_library import NativeLibrary, library


@pytest.fixture
def elf():
    """Some shared library of this machine."""
    found = next(Path(numpy.__file__).parent.rglob("*.so"), None)
    if found is None:
        pytest.skip("numpy ships no shared library here")
    return found.read_bytes()


@pytest.fixture
def put(tmp_path):
    def put(content):
        path = tmp_path / "_sage_shm.so"
        path.write_bytes(content)
        return path

    return put


def test_an_absent_library_is_no_warning(tmp_path, caplog):
    assert "was not built" in library(tmp_path / "_sage_shm.so")
    assert not caplog.records


@pytest.mark.parametrize("kept", [0, 100, 4096, 0.5, -1])
def test_a_library_that_was_cut_short_is_left_out(kept, elf, put):
    end = int(len(elf) * kept) if isinstance(kept, float) else kept

    reason = library(put(elf[:end]))

    assert "cut short" in reason or "no 64-bit ELF" in reason


def test_a_library_of_another_machine_is_left_out(elf, put):
    foreign = elf[:18] + (0xF3).to_bytes(2, "little") + elf[20:]  # RISC-V

    assert isinstance(library(put(foreign)), str)


def test_another_library_is_left_out_and_that_is_said_once(elf, put, caplog):
    path = put(elf)

    with caplog.at_level(logging.WARNING):
        reasons = {library(path), library(path)}

    assert len(reasons) == 1
    assert "lacks a function" in reasons.pop()
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "_shm.build" in caplog.text


def test_the_library_is_made_anew_when_it_or_a_source_of_it_changed(tmp_path, monkeypatch):
    source, header, target = (tmp_path / n for n in ("_native.c", "_native_x.h", "_sage_shm.so"))
    monkeypatch.setattr(build, "SOURCE", source)
    for file in (source, header, target):
        file.write_text("as it was")
    assert not build.is_current(target)

    for file in (source, header, target):
        build.mark_current(target)
        assert build.is_current(target)
        file.write_text("changed")
        assert not build.is_current(target)
    build.mark_current(target)
    target.unlink()
    assert not build.is_current(target)


def test_where_there_is_a_compiler_the_engine_is_there():
    if build.compiler() is None:
        pytest.skip("no C compiler")
    assert isinstance(library(), NativeLibrary), library()


@pytest.mark.parametrize(("name", "text"), [("ABI", "another version"), ("LAYOUT", "another lay")])
def test_a_library_of_another_version_is_refused(name, text, monkeypatch):
    if isinstance(library(), str):
        pytest.skip("the engine was not built here")
    other = 99 if name == "ABI" else (*native_library.LAYOUT[:-1], 99)
    monkeypatch.setattr(native_library, name, other)
    with pytest.raises(ValueError, match=text):
        native_library.load(native_library.LIBRARY)
