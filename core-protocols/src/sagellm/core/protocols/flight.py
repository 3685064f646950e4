"""Flight records of groups: written on a signal, put side by side, and given to torch's analyzer.

    python -m sagellm.core.protocols.flight FOLDER [--torch OUT]

prints who is late according to the dumps in a folder. `--torch` also writes the files that
`torchfrtrace OUT` and `python -m torch.distributed.flight_recorder.fr_trace OUT` read: torch
keeps them as pickles, which are written here and never read.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import CommError, ConfigError, IntegrityError

__all__ = ["dump_on_signal", "main", "read_dumps", "summarize", "write_torch_traces"]

_MAX_DUMP_BYTES = 1 << 30


def read_dumps(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:  # Any: JSON
    """The dumps `flight-*.json` of a folder, by group and rank.

    Raises:
        ConfigError: The folder holds none.
        IntegrityError: A file is not such a dump.

    """
    dumps = []
    for path in sorted(Path(folder).glob("flight-*.json")):
        if path.stat().st_size > _MAX_DUMP_BYTES:
            raise IntegrityError(
                f"{path} has {path.stat().st_size} bytes, at most {_MAX_DUMP_BYTES}"
            )
        try:
            dump = json.loads(path.read_text(encoding="utf-8"))
            about = dump["sagellm"]
            found = all(isinstance(dump[key], kind) for key, kind in _SHAPE.items())
            found = found and isinstance(about["group"], str) and isinstance(about["size"], int)
            found = found and all(isinstance(e["collective_seq_id"], int) for e in dump["entries"])
        except (ValueError, KeyError, TypeError) as e:
            raise IntegrityError(f"{path} is no flight record: {type(e).__name__}: {e}") from None
        if not found:
            raise IntegrityError(f"{path} is no flight record: a field has another type")
        dumps.append(dump)
    if not dumps:
        raise ConfigError(f"no flight-*.json in {folder}; set observe.flight_folder to write them")
    return sorted(dumps, key=lambda d: (d["sagellm"]["group"], d["rank"]))


_SHAPE: dict[str, type] = {
    "version": str,
    "rank": int,
    "pg_config": dict,
    "pg_status": dict,
    "entries": list,
}


def summarize(dumps: Sequence[Mapping[str, Any]]) -> str:
    """One line per group: which ranks are behind, at which call, and whose dumps are missing."""
    from ._process_group.failure import say_positions
    from ._process_group.transport import Position

    lines = []
    for group in sorted({d["sagellm"]["group"] for d in dumps}):
        ours = [d for d in dumps if d["sagellm"]["group"] == group]
        positions: dict[int, Position | None] = {}
        for dump in ours:
            last = [e for e in dump["entries"] if not e["is_p2p"]][-1:]
            at: Mapping[str, Any] = (
                last[0] if last else {"collective_seq_id": 0, "op": "nothing", "state": "scheduled"}
            )
            positions[dump["sagellm"]["rank"]] = Position(
                at["collective_seq_id"], str(at["op"]), str(at["state"])
            )
        size = max(d["sagellm"]["size"] for d in ours)
        silent = [str(r) for r in range(size) if r not in positions]
        parts = [say_positions(positions)]
        if silent:
            parts.append(f"no dump of rank {', '.join(silent)}")
        text = "; ".join(p for p in parts if p) or f"all ranks are at the same call ({len(ours)})"
        lines.append(f"group {group}: {text}")
    return "\n".join(lines)


def write_torch_traces(
    dumps: Sequence[Mapping[str, Any]], folder: str | os.PathLike[str]
) -> list[Path]:
    """Write one file `rank_<global rank>` per rank for torch's analyzer; all groups in it.

    Sends and receives are left out: the analyzer expects every rank of a group at each entry.
    """
    where = Path(folder)
    where.mkdir(parents=True, exist_ok=True)
    merged: dict[int, dict[str, Any]] = {}
    for dump in dumps:
        trace = merged.setdefault(
            dump["rank"],
            {"version": dump["version"], "pg_config": {}, "pg_status": {}, "entries": []},
        )
        trace["pg_config"] |= dump["pg_config"]
        trace["pg_status"] |= dump["pg_status"]
        trace["entries"] += [dict(e) for e in dump["entries"] if not e["is_p2p"]]
    paths = []
    for rank, trace in sorted(merged.items()):
        trace["entries"].sort(key=lambda e: e["time_created_ns"])
        # Ranks that share one group only have its numbers; with several the order is all there is.
        alone = len(trace["pg_config"]) == 1
        for number, entry in enumerate(trace["entries"]):
            entry["record_id"] = entry["collective_seq_id"] if alone else number
        path = where / f"rank_{rank}"
        path.write_bytes(pickle.dumps(trace))
        paths.append(path)
    return paths


def dump_on_signal(signum: int, folder: str | os.PathLike[str]) -> Callable[[], None]:
    """Write the record of every group that was used to `folder` whenever `signum` arrives.

    Works while the main thread is blocked in a library: a thread of its own writes. Nothing is
    installed unless this is called, from the main thread. Returns what undoes it.

    Raises:
        ConfigError: Not the main thread, no such signal, or it has a handler already.

    """
    try:
        if signal.getsignal(signum) not in (signal.SIG_DFL, None):
            raise ConfigError(f"signal {signum} has a handler already; choose another, as SIGUSR2")
    except ValueError as e:
        raise ConfigError(f"signal {signum}: {e}") from None
    if threading.current_thread() is not threading.main_thread():
        raise ConfigError("dump_on_signal must be called from the main thread")
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)

    def handler(number: int, frame: object) -> None:
        # The byte is written in C, at once, unless somebody else owns the wakeup descriptor.
        current = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(current)
        if current != write_end:
            os.write(write_end, bytes([number]))

    signal.signal(signum, handler)
    former = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    if former != -1:
        signal.set_wakeup_fd(former)

    def serve() -> None:
        while data := os.read(read_end, 4096):
            if signum in data:
                _dump_all(folder, f"signal {signum}")
        os.close(read_end)

    thread = threading.Thread(target=serve, name="sagellm-comm-flight", daemon=True)
    thread.start()

    def undo() -> None:
        signal.signal(signum, signal.SIG_DFL)
        current = signal.set_wakeup_fd(-1)
        if current != write_end:
            signal.set_wakeup_fd(current)
        os.close(write_end)
        thread.join(timeout=5)

    return undo


def _dump_all(folder: str | os.PathLike[str], reason: str) -> None:
    from ._process_group.observed import live_groups

    for group in live_groups():
        if group.calls_so_far:
            group.dump_to(folder, reason)


def main(argv: Sequence[str] | None = None) -> int:
    """Print who is late; the exit code is 2 when there is nothing to read."""
    parser = argparse.ArgumentParser(prog="python -m sagellm.core.protocols.flight")
    parser.add_argument("folder", help="where the dumps flight-*.json are")
    parser.add_argument("--torch", metavar="OUT", help="also write files for torchfrtrace there")
    arguments = parser.parse_args(argv)
    try:
        dumps = read_dumps(arguments.folder)
        sys.stdout.write(summarize(dumps) + "\n")
        if arguments.torch:
            for path in write_torch_traces(dumps, arguments.torch):
                sys.stdout.write(f"{path}\n")
    except (CommError, OSError) as e:
        sys.stderr.write(f"{e}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
