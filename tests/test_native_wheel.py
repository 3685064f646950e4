"""Wheels with C: what is in them, and what their tags say, with a compiler and without."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import pytest

SHM = "sagellm/comm/collective_ops/_shm"
LIBRARY = f"{SHM}/_sage_shm.so"
SOURCES = ("_native.c",)

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="C is for Linux only")


@pytest.fixture
def build(root, tmp_path):
    """Build one target of a copy of collective_ops, with `cc` as the only compiler."""
    pytest.importorskip("hatchling")
    copy = tmp_path / "package"
    package = root / "packages" / "sagellm-comm-collective-ops"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("*.so*", "__pycache__"))

    def build(target, cc):
        out = tmp_path / target
        env = {**os.environ, "CC": str(cc), "PATH": str(tmp_path / "nothing")}
        subprocess.run(
            [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(out)],
            cwd=copy, env=env, check=True, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        (archive,) = out.iterdir()
        return archive

    return build


@pytest.fixture
def cc(tmp_path):
    """What looks like a compiler, and leaves a library behind."""
    command = tmp_path / "cc"
    command.write_text(
        f"#!{sys.executable}\nimport sys\n"
        "open(sys.argv[sys.argv.index('-o') + 1], 'w').write('a library')\n"
    )
    command.chmod(0o755)
    return command


def test_with_a_compiler_the_wheel_has_the_library_and_names_the_platform(build, cc):
    wheel = build("wheel", cc)

    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.stem.endswith(f"-py3-none-{platform}")
    names = zipfile.ZipFile(wheel).namelist()
    assert names.count(LIBRARY) == 1
    assert "Root-Is-Purelib: false" in _metadata(wheel, "WHEEL")


def test_without_a_compiler_the_wheel_is_for_every_platform(build, tmp_path):
    wheel = build("wheel", tmp_path / "no-such-compiler")

    assert wheel.stem.endswith("-py3-none-any")
    assert LIBRARY not in zipfile.ZipFile(wheel).namelist()


def test_the_sdist_has_what_a_build_needs(build, cc):
    with tarfile.open(build("sdist", cc)) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}

    assert {f"src/{SHM}/{name}" for name in (*SOURCES, "build.py")} <= names
    assert "hatch_build.py" in names
    assert f"src/{LIBRARY}" not in names


def _metadata(wheel, name):
    archive = zipfile.ZipFile(wheel)
    (path,) = [n for n in archive.namelist() if n.endswith(f".dist-info/{name}")]
    return archive.read(path).decode()
