"""Arguments and exit codes of the command line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict

from sagellm.core.protocols import CommError, ConfigError
from sagellm.core.protocols.checkup import print_findings
from sagellm.core.protocols.selection import backend_registry
from sagellm.core.protocols.show import (
    bytes_text,
    parse_bytes,
    print_json,
    print_line,
    print_table,
    rate_text,
)

from .bench import OPS, run_bench
from .checkup import examine
from .choose import run_explain
from .info import collect_info, print_info
from .launch import is_launched

__all__ = ["main"]

_ENDING = """exit codes: 0 all is well, 1 something does not work or is wrong, 2 bad arguments.
bench and explain start their ranks themselves, or are ranks under torchrun:
  torchrun --nproc-per-node 2 -m sagellm.comm.collective_ops bench"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sagellm.comm.collective_ops",
        description="What the collective backends are, can do, choose and reach on this host.",
        epilog=_ENDING,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.add_argument("--json", action="store_true", help="print JSON")
        return made

    info = add("info", "backends, probes, capabilities, engines and versions")
    info.add_argument("--backend", help="print this one's capability table")

    bench = add("bench", "time, algbw and busbw of backends side by side, checked for correctness")
    bench.add_argument("ops", nargs="*", help=f"default all_reduce; of {', '.join(OPS)}")
    bench.add_argument("--sizes", default="1k,64k,1m,16m", help="comma-separated, as 1k,64k,1m")
    bench.add_argument("--backends", help="comma-separated names; default all that run here")
    bench.add_argument("--dtype", default="float32", help="torch's name of the element type")

    explain = add("explain", "what would run for one call, and why")
    explain.add_argument("op", help="operation, such as all_reduce")
    explain.add_argument("nbytes", help="size of this rank's input, as 64k")
    explain.add_argument("--backend", default="auto", help="name, default auto")

    explain.add_argument(
        "--calibrate", action="store_true",
        help="measure the algorithms first, or take what was measured on these hosts before; "
        "for backends with the option `calibrate`, such as gloo",
    )  # fmt: skip

    doctor = add("doctor", "whether this host can run each backend, and what to do if not")
    for made in (bench, explain, doctor):
        made.add_argument("--ranks", type=int, help="ranks on this host, default 2")
    for made in (bench, explain):
        made.add_argument("--device", default="cpu", help="torch device type, default cpu")
        made.add_argument("--timeout-s", type=float, default=30.0, help="deadline of every call")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = _parser().parse_args(argv)
    # Library chatter about sockets that close when ranks end is no news to a reader of tables.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        return {"info": _info, "bench": _bench, "explain": _explain, "doctor": _doctor}[
            arguments.command
        ](arguments)
    except (ConfigError, ValueError) as e:
        sys.stderr.write(f"{e}\n")
        return 2
    except CommError as e:
        sys.stderr.write(f"{e}\n")
        return 1


def _info(arguments: argparse.Namespace) -> int:
    info = collect_info()
    names = [b["name"] for b in info["backends"]]
    if arguments.backend is not None and arguments.backend not in names:
        raise ConfigError(f"no backend {arguments.backend!r}; installed: {', '.join(names)}")
    if arguments.json:
        print_json(info)
    else:
        print_info(info, arguments.backend)
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    sizes = [parse_bytes(text) for text in arguments.sizes.split(",") if text.strip()]
    names = _contenders(arguments.backends, arguments.device)
    rows, failed = run_bench(
        arguments.ops or ["all_reduce"],
        sizes,
        names,
        device=arguments.device,
        dtype=arguments.dtype,
        ranks=arguments.ranks,
        timeout_s=arguments.timeout_s,
    )
    if is_launched() and os.environ["RANK"] != "0":
        return 0
    if arguments.json:
        print_json({"rows": [asdict(row) for row in rows], "failed": failed})
    else:
        columns = ["op", "size", "dtype", "backend", "calls", "time us", "p99 us", "algbw GB/s",
                   "busbw GB/s", "wrong"]  # fmt: skip
        table = [
            [
                row.op, bytes_text(row.nbytes), row.dtype, row.backend, str(row.calls),
                f"{row.time_us:.1f}", f"{row.p99_us:.1f}", rate_text(row.algbw_bytes_per_s),
                rate_text(row.busbw_bytes_per_s), str(row.wrong),
            ]
            for row in rows
            if not row.error
        ]  # fmt: skip
        print_table("", columns, table, right=[c for c in columns if c not in columns[:4]])
        for name, why in failed.items():
            print_line(f"{name} did not run: {why}")
    return 1 if failed or any(row.wrong for row in rows) else 0


def _contenders(named: str | None, device: str) -> list[str]:
    registry = backend_registry()
    if named is not None:
        names = [name.strip() for name in named.split(",") if name.strip()]
        for name in names:
            registry.load(name)
        return names
    found = []
    for name, spec in registry.load_all().items():
        # Negative priorities are for tests: ranks of the mock are threads, for one.
        if spec.priority >= 0 and device in spec.device_types and spec.probe().available:
            found.append(name)
    if not found:
        raise ConfigError(f"no backend runs on {device} here; `info` says why")
    return found


def _explain(arguments: argparse.Namespace) -> int:
    answer = run_explain(
        arguments.op,
        parse_bytes(arguments.nbytes),
        arguments.backend,
        device=arguments.device,
        ranks=arguments.ranks,
        timeout_s=arguments.timeout_s,
        calibrate=arguments.calibrate,
    )
    if answer is None:
        return 0
    if arguments.json:
        print_json(answer)
        return 0 if "choice" in answer and answer["agree"] else 1
    if "selection" in answer:
        print_line(answer["selection"] + "\n")
    size = bytes_text(answer["nbytes"])
    print_line(f"{answer['op']} of {size} over {answer['ranks']} ranks:")
    if "choice" not in answer:
        print_line(f"  cannot run: {answer['error']}")
        return 1
    choice = answer["choice"]
    print_line(f"  {choice['backend']}: {choice['algorithm']}")
    print_line(f"  {choice['reason']}")
    if choice["estimate_us"] is not None:
        print_line(f"  expected {choice['estimate_us']:.1f} us")
    for name, why in choice["rejected"].items():
        print_line(f"  not {name}: {why}")
    if not answer["agree"]:
        print_line("  the ranks do not agree; that is a bug, please report it with --json")
        return 1
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    return print_findings(examine(arguments.ranks), as_json=arguments.json)
