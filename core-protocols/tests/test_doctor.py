"""What is found wrong with an environment, by real folders and real interpreters."""

import subprocess
import sys

import pytest

import sagellm.core.protocols.doctor as doctor
from sagellm.core.protocols.doctor import diagnose
from sagellm.core.protocols.errors import ConfigError


def install(folder, name, version="1.0", files=()):
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    record = [f"{info.name}/METADATA,,", *(f"{f},," for f in files)]
    (info / "RECORD").write_text("\n".join(record) + "\n")
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("")
    return str(folder)


def test_a_healthy_folder_has_no_findings(tmp_path):
    path = install(tmp_path, "sagellm-comm-topology", files=["sagellm/comm/topology/__init__.py"])

    assert diagnose([path], platform="linux") == []


@pytest.mark.parametrize(
    "file",
    ["sagellm/__init__.py", "sagellm/comm/__init__.py", "sagellm/core/__init__.py", "sagellm.py"],
)
def test_who_hides_the_namespace_is_named(tmp_path, file):
    path = install(tmp_path, "isagellm", files=[file])

    (finding,) = diagnose([path], platform="linux")

    assert finding.kind == "namespace"
    assert finding.severity == "error"
    assert "'isagellm'" in finding.message
    assert str(tmp_path / file) in finding.message
    assert finding.next_step == "pip uninstall isagellm"


def test_a_file_that_nobody_owns_is_to_be_deleted(tmp_path):
    (tmp_path / "sagellm").mkdir()
    (tmp_path / "sagellm" / "__init__.py").write_text("")

    (finding,) = diagnose([str(tmp_path)], platform="linux")

    assert finding.next_step == f"delete {tmp_path / 'sagellm' / '__init__.py'}"


def test_the_command_explains_what_import_does_not(tmp_path):
    path = install(tmp_path, "isagellm", files=["sagellm/__init__.py"])
    environ = {"PYTHONPATH": path, "PATH": ""}

    hidden = subprocess.run(
        [sys.executable, "-S", "-c", "import sagellm.comm.topology"],
        env=environ, capture_output=True, text=True,
    )  # fmt: skip
    explained = subprocess.run(
        [sys.executable, doctor.__file__], env=environ, capture_output=True, text=True
    )

    assert hidden.returncode != 0
    assert explained.returncode == 1, explained.stderr
    assert "pip uninstall isagellm" in explained.stdout


def test_windows_is_refused():
    (finding,) = diagnose([], platform="win32")

    assert finding.severity == "error"
    assert "WSL" in finding.next_step
    with pytest.raises(ConfigError, match="Windows"):
        doctor.require_supported_platform("win32")
    doctor.require_supported_platform("linux")


def test_an_unknown_platform_is_a_warning():
    (finding,) = diagnose([], platform="sunos5")

    assert finding.severity == "warning"


def test_an_old_python_is_refused():
    (finding,) = diagnose([], platform="linux", python=(3, 10))

    assert "3.11" in finding.next_step


def test_versions_that_do_not_belong_together(tmp_path):
    install(tmp_path, "sagellm-core-protocols", "0.2.0")
    install(tmp_path, "sagellm-comm-overlap", "0.1.3")
    install(tmp_path, "sagellm-comm-topology", "0.2.9")

    (finding,) = diagnose([str(tmp_path)], platform="linux")

    assert finding.kind == "version"
    assert "sagellm-comm-overlap 0.1.3" in finding.message


def test_after_one_zero_only_majors_must_agree(tmp_path):
    install(tmp_path, "sagellm-core-protocols", "1.2.0")
    install(tmp_path, "sagellm-comm-overlap", "1.7.0")

    assert diagnose([str(tmp_path)], platform="linux") == []


def test_a_package_that_is_there_twice(tmp_path):
    paths = [install(tmp_path / n, "sagellm-core-protocols", "0.1.0") for n in ("a", "b")]

    (finding,) = diagnose(paths, platform="linux")

    assert finding.kind == "duplicate"
    assert "installed 2 times" in finding.message


def test_the_command_here(capsys):
    assert doctor.main([]) == 0, capsys.readouterr().out
    assert capsys.readouterr().out
    assert doctor.main(["--help-me"]) == 2
