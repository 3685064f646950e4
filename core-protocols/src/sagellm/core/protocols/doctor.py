"""Finds what keeps the packages from working in this environment, and says what to do.

    python -m sagellm.core.protocols.doctor

The packages share the namespace `sagellm`, which exists only as long as nobody ships
`sagellm/__init__.py`. A distribution named `isagellm` does: once it is installed, Python looks
no further, and `import sagellm.comm` fails with a message that names none of this. Where that
hides this module too, run it by its file: `python …/sagellm/core/protocols/doctor.py`.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["Finding", "diagnose", "main", "require_supported_platform"]

_LEVELS = (("sagellm",), ("sagellm", "comm"), ("sagellm", "core"))
_FAMILY = (
    "sagellm-core-protocols",
    "sagellm-comm-collective-ops",
    "sagellm-comm-domestic",
    "sagellm-comm-kv-transfer",
    "sagellm-comm-overlap",
    "sagellm-comm-topology",
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at and is not as it should be.

    Attributes:
        kind: `namespace`, `platform`, `python`, `version` or `duplicate`.
        severity: `error` when something cannot work, `warning` when it may not.
        message: What is so, with the values.
        next_step: What to do about it.

    """

    kind: Literal["namespace", "platform", "python", "version", "duplicate"]
    severity: Literal["error", "warning"]
    message: str
    next_step: str


def diagnose(
    path: Sequence[str] | None = None,
    *,
    platform: str | None = None,
    python: tuple[int, int] | None = None,
) -> list[Finding]:
    """What is wrong with this environment; an empty list when nothing is.

    Args:
        path: Folders to look at; None is `sys.path`.
        platform: As `sys.platform` writes it; None is this one.
        python: Major and minor version; None is this one.

    """
    folders = [p or "." for p in (sys.path if path is None else path)]
    return [
        *_platform(sys.platform if platform is None else platform),
        *_python(sys.version_info[:2] if python is None else python),
        *_namespace(folders),
        *_versions(folders),
    ]


def require_supported_platform(platform: str | None = None) -> None:
    """Raise unless the packages can work on this operating system.

    Raises:
        ConfigError: On Windows; the message says what to use instead.

    """
    from .errors import ConfigError

    for finding in _platform(sys.platform if platform is None else platform):
        if finding.severity == "error":
            raise ConfigError(f"{finding.message}; {finding.next_step}")


def _platform(platform: str) -> list[Finding]:
    if platform in ("win32", "cygwin"):
        return [
            Finding(
                "platform", "error",
                f"sagellm.comm does not run on Windows ({platform})",
                "use Linux; WSL 2 is Linux too",
            )
        ]  # fmt: skip
    if platform != "linux" and platform != "darwin":
        return [
            Finding(
                "platform", "warning",
                f"sagellm.comm has never been run on {platform!r}",
                "Linux is supported in full, macOS with gloo and tcp",
            )
        ]  # fmt: skip
    return []


def _python(python: tuple[int, int]) -> list[Finding]:
    if python < (3, 11):
        found = f"Python {python[0]}.{python[1]} is too old"
        return [Finding("python", "error", found, "make an environment with Python 3.11 or newer")]
    return []


def _namespace(folders: Iterable[str]) -> list[Finding]:
    findings = []
    owners: dict[str, list[str]] | None = None
    for folder in dict.fromkeys(os.path.abspath(f) for f in folders):
        for level in _LEVELS:
            stem = Path(folder, *level)
            for suffix in ("/__init__.py", *importlib.machinery.all_suffixes()):
                file = Path(f"{stem}{suffix}")
                if not file.is_file():
                    continue
                if owners is None:
                    owners = _owners(folders)
                name = ".".join(level)
                who = owners.get(os.path.realpath(file), [])
                shipped = f"distribution {who[0]!r} ships" if who else "something left"
                findings.append(
                    Finding(
                        "namespace",
                        "error",
                        f"{shipped} {file}: `{name}` is then an ordinary package, and Python finds "
                        f"no {name}.* of any other distribution",
                        f"pip uninstall {who[0]}" if who else f"delete {file}",
                    )
                )
    return findings


def _owners(folders: Iterable[str]) -> dict[str, list[str]]:
    """Real path of each file at a shared level, to the distributions that list it."""
    found: dict[str, list[str]] = {}
    for distribution in importlib.metadata.distributions(path=list(folders)):
        for file in distribution.files or ():
            if file.parts[:1] in (("sagellm",), ("sagellm.py",)) and len(file.parts) <= 3:
                path = os.path.realpath(str(distribution.locate_file(file)))
                found.setdefault(path, []).append(distribution.metadata["Name"] or str(file))
    return found


def _versions(folders: Iterable[str]) -> list[Finding]:
    """Distributions of this family that are there twice, or from different minor versions."""
    found: dict[str, list[tuple[str, str]]] = {}
    for distribution in importlib.metadata.distributions(path=list(folders)):
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        if name in _FAMILY:
            where = os.path.realpath(str(distribution.locate_file("")))
            entry = (distribution.version, where)
            if entry not in found.setdefault(name, []):
                found[name].append(entry)
    findings = [
        Finding(
            "duplicate", "warning",
            f"{name} is installed {len(entries)} times: "
            + ", ".join(f"{version} in {where}" for version, where in entries),
            f"pip uninstall {name} until none is left, then install it once",
        )
        for name, entries in sorted(found.items())
        if len({where for _, where in entries}) > 1
    ]  # fmt: skip
    minors = {name: ".".join(e[0][0].split(".")[:2]) for name, e in sorted(found.items())}
    core = minors.get("sagellm-core-protocols")
    if core is not None:
        # Before 1.0 the interfaces may change with every minor version; after it with majors.
        width = 2 if core.startswith("0.") else 1
        for name, minor in minors.items():
            if minor.split(".")[:width] != core.split(".")[:width]:
                findings.append(
                    Finding(
                        "version", "warning",
                        f"{name} {found[name][0][0]} was made for another minor version than "
                        f"sagellm-core-protocols {found['sagellm-core-protocols'][0][0]}",
                        f"pip install --upgrade {name} sagellm-core-protocols",
                    )
                )  # fmt: skip
    return findings


def main(argv: Sequence[str] | None = None) -> int:
    """Print what is wrong; the exit code is 1 when something cannot work."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments:
        sys.stderr.write(f"doctor takes no arguments, not {arguments}\n")
        return 2
    findings = diagnose()
    for finding in findings:
        sys.stdout.write(f"{finding.severity}: {finding.message}\n    {finding.next_step}\n")
    if not findings:
        sys.stdout.write("nothing is wrong with this environment\n")
    return 1 if any(f.severity == "error" for f in findings) else 0


if __name__ == "__main__":
    raise SystemExit(main())
