"""`bench`: the benchmarks of this package by their short names."""

from __future__ import annotations

import argparse
import importlib

__all__ = ["NAMES", "add_bench", "bench"]

NAMES = ("transfer", "latency", "cpu", "codecs")


def add_bench(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    parser.add_argument("name", choices=NAMES, help="what to measure")
    parser.add_argument(
        "rest", nargs=argparse.REMAINDER,
        help="arguments of the benchmark, such as --quick, --json FILE, --markdown FILE",
    )  # fmt: skip


def bench(arguments: argparse.Namespace) -> int:
    """Run it; the exit code."""
    package = "sagellm.comm.kv_transfer.benchmarks"
    module = importlib.import_module(f"{package}.bench_{arguments.name}")
    return int(module.main(arguments.rest))
