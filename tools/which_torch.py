"""Print the torch that this interpreter imports, or say that it has none."""

from __future__ import annotations

import importlib.util
import sys


def main() -> int:
    """One line about torch; 1 if there is none."""
    if importlib.util.find_spec("torch") is None:
        print(f"no torch here; the Python beneath is {sys.base_prefix}", file=sys.stderr)
        return 1

    import torch

    print("torch", torch.__version__, torch.__file__)
    return 0


if __name__ == "__main__":
    sys.exit(main())
