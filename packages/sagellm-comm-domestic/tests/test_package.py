"""The package as a whole: what it exports, and what importing it must not do."""

import ast
import sys
from pathlib import Path

import pytest

import sagellm.comm.domestic as domestic
from sagellm.core.protocols import ConfigError

SOURCE = Path(domestic.__file__).parent


def test_everything_promised_is_there():
    assert all(getattr(domestic, name) is not None for name in domestic.__all__)
    assert issubclass(domestic.HCCLBackend, domestic.DomesticBackend)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = domestic.nothing


def test_importing_it_imports_no_torch(python):
    program = """
        import sys
        import sagellm.comm.domestic
        from sagellm.comm.domestic import specs
        specs.HCCL.probe()
        answer(sorted(m for m in sys.modules if m in ("torch", "torch_npu")))
    """
    assert python(program) == []


def test_it_imports_no_sibling():
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                own = "sagellm.comm.domestic"
                assert not name.startswith("sagellm.comm.") or name.startswith(own), file


def test_the_readme_lists_every_vendor_as_unverified():
    readme = SOURCE.parents[3] / "README.md"
    if not readme.is_file():
        pytest.skip("an installed package has no README beside it")
    rows = [line for line in readme.read_text().splitlines() if line.startswith("| `")]

    assert [line.split("`")[1] for line in rows] == list(domestic.VENDORS)
    assert all("unverified" in line for line in rows)


def test_names_that_need_torch_are_listed_too():
    assert set(domestic._NEED_TORCH) <= set(dir(domestic))


def test_windows_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")

    with pytest.raises(ConfigError, match=r"Windows .*use Linux"):
        domestic.create_domestic_backend("hccl")
