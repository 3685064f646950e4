"""Each distribution says of itself what is true, and the tools know every one of them."""

import re

from packaging.requirements import Requirement
from packaging.version import Version

PYTHONS = ("3.11", "3.12", "3.13")


def test_licence_is_the_workspaces(package, root):
    text = (root / "LICENSE").read_text()

    assert (package.path / "LICENSE").read_text() == text
    assert package.project["license"] == "Apache-2.0"
    assert package.project["license-files"] == ["LICENSE"]


def test_pythons_are_the_same_everywhere(package, root):
    classifiers = package.project["classifiers"]

    assert package.project["requires-python"] == ">=3.11"
    for python in PYTHONS:
        assert f"Programming Language :: Python :: {python}" in classifiers
    assert f"PYTHONS = {list(PYTHONS)!r}".replace("'", '"') in (root / "noxfile.py").read_text()


def test_version_stands_in_a_file_of_its_own(package):
    text = (package.folder / "_version.py").read_text()

    assert package.project["dynamic"] == ["version"]
    Version(re.search(r'__version__ = "(.+)"', text)[1])


def test_package_folder_is_complete(package):
    for name in ("README.md", "CHANGELOG.md", "changes", "src", "tests", "examples"):
        assert (package.path / name).exists(), name


def test_changelog_has_the_line_that_towncrier_writes_below(package):
    config = package.tool["towncrier"]

    assert config["start_string"] in (package.path / config["filename"]).read_text()
    assert config["name"] == package.project["name"]


def test_fragments_have_a_known_kind(package):
    kinds = "|".join(t["directory"] for t in package.tool["towncrier"]["type"])
    names = [f.name for f in (package.path / "changes").iterdir() if f.name != ".gitkeep"]

    assert [
        n for n in names if not re.fullmatch(rf"(\d+|\+[\w-]+)\.({kinds})(\.\d+)?\.md", n)
    ] == []


def test_torch_has_a_lower_bound_and_no_upper_one(package):
    lists = [
        package.project["dependencies"],
        *package.project.get("optional-dependencies", {}).values(),
    ]
    for requirement in (Requirement(r) for one in lists for r in one):
        if requirement.name == "torch":
            assert [s.operator for s in requirement.specifier] == [">="]


def test_dependencies_are_core_and_no_sibling(package, packages):
    members = {p.project["name"] for p in packages}
    needed = {Requirement(r).name for r in package.project["dependencies"]} & members

    assert needed == (set() if package.is_core else {"sagellm-core-protocols"})


def test_only_device_lines_are_left_out_of_coverage(package):
    found = [
        f"{file}: {line}"
        for file in package.folder.rglob("*.py")
        for line in file.read_text().splitlines()
        if re.search(r"pragma:?\s*no\s*(cover|branch)", line)
    ]

    assert not found
