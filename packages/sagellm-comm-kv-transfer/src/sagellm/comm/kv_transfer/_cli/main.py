"""Arguments and exit codes of the command line."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from sagellm.core.protocols import CommError, ConfigError

from .bench import add_bench, bench
from .calibrate import add_calibrate, calibrate
from .doctor import add_doctor, doctor
from .probe import add_probe, probe
from .send import add_send, send
from .serve import add_serve, serve

__all__ = ["main"]

_ENDING = """exit codes: 0 all is well, 1 something failed or cannot work, 2 bad arguments,
130 interrupted. Two terminals on one host:
  (umask 077; head -c 32 /dev/urandom | base64 > key)
  python -m sagellm.comm.kv_transfer serve --key-file key --listen 127.0.0.1:7777 --output .
  python -m sagellm.comm.kv_transfer send 127.0.0.1:7777 --key-file key --file big.bin"""

_COMMANDS = {
    "serve": (serve, add_serve, "a node that takes what is sent to it, into memory or files"),
    "send": (send, add_send, "send a file or random blocks to a node"),
    "probe": (probe, add_probe, "whether a node can be reached, over what, and how fast"),
    "bench": (bench, add_bench, "measure beside memcpy, sockets, gloo, ZeroMQ, NIXL, Mooncake"),
    "calibrate": (calibrate, add_calibrate, "fit the basis of codec `transform` for a model"),
    "doctor": (doctor, add_doctor, "what this host lacks, or what a node holds and waits for"),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sagellm.comm.kv_transfer",
        description="Move KV-cache blocks and files between processes, and see what happens.",
        epilog=_ENDING,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, add, text) in _COMMANDS.items():
        made = commands.add_parser(name, help=text, description=text)
        if name != "bench":  # whose own --json takes a file
            made.add_argument("--json", action="store_true", help="print JSON")
        add(made)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = _parser().parse_args(argv)
    arguments.interrupted = False

    def interrupt(number: int, frame: object) -> None:
        arguments.interrupted = True  # where Python may not raise, as in a destructor, it is lost
        raise KeyboardInterrupt

    before = {n: signal.signal(n, interrupt) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        run, _, _ = _COMMANDS[arguments.command]
        return run(arguments)
    except KeyboardInterrupt:
        return 130
    except (ConfigError, ValueError) as e:
        sys.stderr.write(f"{e}\n")
        return 2
    except CommError as e:
        sys.stderr.write(f"{e}\n")
        return 1
    except BrokenPipeError:  # who reads our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
