"""Run a contract suite from the command line.

    python -m sagellm.core.protocols.testing --backend mod:Class [--world-size 2] [--json F]

Exit codes: 0 when the contract is kept, 1 when something failed (or, with `--reference`, was
skipped), 2 when there was nothing to try.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from sagellm.core.protocols.errors import BackendUnavailableError, ConfigError

from .codec_suite import check_codec
from .comm_suite import check_backend
from .contract import Report
from .detector_suite import check_detector
from .overlap_suite import check_overlap_manager
from .transport_suite import check_transport

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the arguments name, print the reports, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m sagellm.core.protocols.testing", description="Run contract suites."
    )
    what = "module:attribute, or the name of an entry point; may be given more than once"
    whats = {"overlap-manager": "module:attribute; may be given more than once"}
    kinds = ("backend", "transport", "codec", "detector", "overlap-manager")
    for kind in kinds:
        parser.add_argument(f"--{kind}", action="append", default=[], metavar="NAME",
                            help=whats.get(kind, what))  # fmt: skip
    parser.add_argument("--world-size", type=int, default=2, help="ranks of a backend (2)")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN",
                        help="only these checks, such as 'all_reduce*'")  # fmt: skip
    parser.add_argument("--reference", action="store_true", help="a skipped check fails")
    parser.add_argument("--json", metavar="FILE", help="write the reports here")
    options = parser.parse_args(argv)
    if options.world_size < 1:
        parser.error(f"--world-size {options.world_size} is not positive")
    reports: list[Report] = []
    try:
        for name in options.backend:
            reports.append(check_backend(name, world_size=options.world_size, only=options.only))
        for name in options.transport:
            reports.append(check_transport(name, only=options.only))
        for name in options.codec:
            reports.append(check_codec(name, only=options.only))
        for name in options.detector:
            reports.append(check_detector(name, only=options.only))
        for name in options.overlap_manager:
            reports.append(check_overlap_manager(name, only=options.only))
    except (ConfigError, BackendUnavailableError) as e:
        sys.stderr.write(f"{e}\n")
        return 2
    if not reports:
        parser.error("nothing to try: give one of " + ", ".join(f"--{k}" for k in kinds))
    for report in reports:
        sys.stdout.write(report.text() + "\n")
    if options.json:
        Path(options.json).write_text(json.dumps([r.to_json() for r in reports], indent=1) + "\n")
    return 0 if all(r.ok(reference=options.reference) for r in reports) else 1


if __name__ == "__main__":
    raise SystemExit(main())
