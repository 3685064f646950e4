"""The commands of `python -m sagellm.comm.topology`, one module for each group of them.

A module gives `add_commands(commands, source)`: it adds its parsers to `commands`, builds those
that look at a topology on the parent `source`, and sets `run`, a function of the parsed arguments
that returns the exit code. Errors end the program with one line and exit code 2; `python -X dev`
shows where one of ours arose.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sagellm.core.protocols import CommError

from . import check, costs, explain, look, planner
from ._source import source_parser

__all__ = ["main"]

_GROUPS = (look, check, explain, planner, costs)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, or 2 when the command cannot be carried out."""
    parser = argparse.ArgumentParser(
        prog="python -m sagellm.comm.topology", description="Devices, links and paths."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    source = source_parser()
    for group in _GROUPS:
        group.add_commands(commands, source)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except (CommError, OSError) as e:
        print(f"{parser.prog}: {e}", file=sys.stderr)
        return 2
    except Exception as e:
        if sys.flags.dev_mode:
            raise
        told = str(e).splitlines() or [""]
        print(
            f"{parser.prog}: {type(e).__name__}: {told[0]} (an error of ours: "
            "`python -X dev -m sagellm.comm.topology` shows where)",
            file=sys.stderr,
        )
        return 2
