"""Import one installed distribution as a user would, and use what it declares.

    python smoke.py MODULE DISTRIBUTION --absent=OTHER.MODULE ...

Runs in an environment that holds the distribution, what it requires, and nothing else: every
name of `__all__` exists, every entry point loads, the licence is there, no sibling is.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import sys


def find(module: str) -> bool:
    """Whether `module` can be found; a missing parent means no."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def main() -> int:
    """Check the distribution and print one line about it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("module")
    parser.add_argument("distribution")
    parser.add_argument("--absent", action="append", default=[], metavar="MODULE")
    chosen = parser.parse_args()

    if present := [m for m in chosen.absent if find(m)]:
        print(f"{chosen.distribution} alone brought {', '.join(present)}", file=sys.stderr)
        return 1

    module = importlib.import_module(chosen.module)
    missing = [name for name in module.__all__ if not hasattr(module, name)]
    if missing:
        print(f"{chosen.module}.__all__ names what is not there: {missing}", file=sys.stderr)
        return 1

    distribution = importlib.metadata.distribution(chosen.distribution)
    if distribution.version != module.__version__:
        print(f"metadata {distribution.version}, module {module.__version__}", file=sys.stderr)
        return 1
    if not distribution.metadata.get_all("License-File"):
        print(f"{chosen.distribution} ships no licence", file=sys.stderr)
        return 1

    entry_points = list(distribution.entry_points)
    for entry_point in entry_points:
        entry_point.load()
    print(
        f"{chosen.distribution} {distribution.version}: {len(module.__all__)} public names, "
        f"{len(entry_points)} entry points"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
