"""A tag releases one package, and only the version that package is at."""

import re

import pytest


@pytest.fixture
def target(root, run_python):
    return lambda tag: run_python(str(root / "tools" / "release_target.py"), tag, check=False)


def test_a_tag_names_package_archives_and_version(package, target):
    text = (package.folder / "_version.py").read_text()
    version = re.search(r'__version__ = "(.+)"', text)[1]

    done = target(f"{package.name}-v{version}")

    assert done.stdout.split() == [
        f"package={package.name}",
        f"stem={package.project['name'].replace('-', '_')}",
        f"version={version}",
    ]


@pytest.mark.parametrize(
    ("tag", "said"),
    [
        ("topology-v99.0.0", "_version.py says"),
        ("nothing-v0.1.0", "there are core_protocols"),
        ("v0.1.0", "is not <package>-v"),
        ("topology-v0.1", "is not <package>-v"),
        ("topology-v0.1.0\npackage=overlap", "is not <package>-v"),
    ],
)
def test_a_tag_that_fits_nothing_is_refused(tag, said, target):
    done = target(tag)

    assert done.returncode == 1
    assert said in done.stderr
    assert done.stdout == ""
