"""Say what a release tag releases, and refuse one that does not fit the tree.

    python tools/release_target.py kv_transfer-v1.2.3

Prints `package=`, `stem=` and `version=` lines, the form of a workflow's outputs. `package` is
the session suffix (`nox -s build-kv_transfer`), `stem` what the archives' names begin with.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class TagError(ValueError):
    """A tag that releases nothing."""


def distributions(root: Path) -> dict[str, Path]:
    """The folder of every distribution by its session suffix."""
    folders = [root / "core-protocols", *sorted((root / "packages").iterdir())]
    names = {
        f: tomllib.loads((f / "pyproject.toml").read_text())["project"]["name"] for f in folders
    }
    return {
        name.removeprefix("sagellm-").removeprefix("comm-").replace("-", "_"): folder
        for folder, name in names.items()
    }


def target(tag: str, root: Path = ROOT) -> dict[str, str]:
    """The package, archive stem and version that `tag` names.

    Raises:
        TagError: Not of the form <package>-v1.2.3, no such package, or the package's version
            file holds another version.
    """
    match = re.fullmatch(r"([a-z_]+)-v(\d+\.\d+\.\d+(?:(?:a|b|rc)\d+)?)", tag)
    if match is None:
        raise TagError(f"{tag!r} is not <package>-v<major>.<minor>.<patch>")
    package, version = match.groups()
    known = distributions(root)
    if package not in known:
        raise TagError(f"no package {package!r}; there are {', '.join(known)}")

    (file,) = (known[package] / "src").rglob("_version.py")
    found = re.search(r'__version__ = "([^"]+)"', file.read_text())
    if found is None or found[1] != version:
        raise TagError(f"{tag} names {version}; {file.name} says {found[1] if found else None}")
    project = tomllib.loads((known[package] / "pyproject.toml").read_text())["project"]
    return {"package": package, "stem": project["name"].replace("-", "_"), "version": version}


def main() -> int:
    """Print what the tag in the first argument releases; 1 if it releases nothing."""
    try:
        print("\n".join(f"{k}={v}" for k, v in target(sys.argv[1]).items()))
    except TagError as e:
        print(e, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
