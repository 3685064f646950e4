"""The noxfile offers the sessions that people and workflows ask for, and refuses bad archives."""

import importlib.util
import io
import re
import subprocess
import sys
import tarfile
import zipfile

import pytest
import yaml


@pytest.fixture(scope="module")
def sessions(root):
    done = subprocess.run(
        [sys.executable, "-m", "nox", "--list"],
        cwd=root, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return set(re.findall(r"^[-*] (\S+)", done.stdout, re.MULTILINE))


@pytest.fixture(scope="module")
def noxfile(root):
    spec = importlib.util.spec_from_file_location("noxfile_under_test", root / "noxfile.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def workflows(root):
    for file in sorted((root / ".github" / "workflows").glob("*.yml")):
        yield file.name, yaml.safe_load(file.read_text())


def test_every_package_can_be_tested_measured_and_built_alone(package, sessions):
    wanted = {f"{kind}-{package.name}" for kind in ("tests", "tests-min", "bench", "build")}

    assert wanted | {f"tests-{package.name}-{p}" for p in ("3.11", "3.12", "3.13")} <= sessions


def test_workspace_sessions_are_there(sessions):
    assert {
        "tests", "tests-matrix", "tests-min", "tests-examples", "bench", "build", "lint", "types",
        "docs", "demo", "dev", "fuzz", "lock", "report", "perf-gate",
    } <= sessions  # fmt: skip


def test_workflows_run_the_same_packages_and_pythons(root, packages):
    jobs = dict(workflows(root))["ci.yml"]["jobs"]

    for job in ("tests", "oldest"):
        assert set(jobs[job]["strategy"]["matrix"]["package"]) == {p.name for p in packages}
    assert jobs["tests"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]


def test_workflows_and_readmes_ask_for_sessions_that_exist(root, sessions, packages):
    text = "\n".join(
        f.read_text()
        for f in [*root.glob("*.md"), root / ".ci" / "run", *root.glob(".github/workflows/*.yml")]
    )
    asked = set()
    for line in re.findall(r"\bnox (?:--error-on-missing-interpreters )?-s ([^\n`&|]+)", text):
        for word in re.split(r" -- |#|$", line, maxsplit=1)[0].replace('"', "").split():
            asked.add(re.sub(r"\$\{\{ matrix\.package \}\}|\$PACKAGE|\$\{\{.*", "topology", word))
    asked = {re.sub(r"-\$\{\{.*", "", a) for a in asked if re.match(r"[a-z]", a)}

    assert {"demo", "lint", "tests"} <= asked
    assert asked - {"matrix.package", "matrix.python"} <= sessions


def test_release_publishes_without_a_token(root):
    release = dict(workflows(root))["release.yml"]
    publish = release["jobs"]["publish"]

    assert publish["permissions"] == {"id-token": "write"}
    assert "secrets." not in (root / ".github/workflows/release.yml").read_text()


def test_every_job_has_a_time_limit(root):
    for name, workflow in workflows(root):
        for job, body in workflow["jobs"].items():
            assert "timeout-minutes" in body, f"{name}: {job}"


GOOD = "sagellm/comm/topology/__init__.py"


@pytest.mark.parametrize(
    "stray",
    ["sagellm/__init__.py", "sagellm/py.typed", "sagellm/comm/__init__.py", "topology/__init__.py"],
)
def test_a_wheel_with_a_file_at_a_shared_level_is_refused(stray, noxfile, tmp_path):
    wheel = tmp_path / "x-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (GOOD, "x_y-1.dist-info/METADATA", stray):
            archive.writestr(name, "")

    assert noxfile.shared_files(wheel) == [stray]


def test_an_sdist_with_a_file_at_a_shared_level_is_refused(noxfile, tmp_path):
    sdist = tmp_path / "x-1.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        for name in (f"src/{GOOD}", "README.md", "src/sagellm/comm/py.typed"):
            archive.addfile(tarfile.TarInfo(f"x-1/{name}"), io.BytesIO())

    assert noxfile.shared_files(sdist) == ["sagellm/comm/py.typed"]


def test_a_package_comes_with_core_and_nothing_else(noxfile, package):
    names = [p.distribution for p in noxfile.closure(noxfile.PACKAGES[package.name])]

    expected = ["sagellm-core-protocols", package.project["name"]]
    assert names == (expected[:1] if package.is_core else expected)
