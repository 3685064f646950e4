"""Commands of the cost model: calibrate, predict."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from sagellm.comm.topology._numbers import whole_number
from sagellm.comm.topology.cost_model import CostModel
from sagellm.core.protocols import BackendUnavailableError, Estimate, TopologyInfo

from ._source import Commands, byte_count, device_id, read_topology

__all__ = ["add_commands"]

_MOST_RANKS = 1 << 20
_CALIBRATION = "sagellm.topology.calibration/1"
_PREDICTION = "sagellm.topology.prediction/1"


def add_commands(commands: Commands, source: argparse.ArgumentParser) -> None:
    """Add `calibrate` and `predict`."""
    kept = argparse.ArgumentParser(add_help=False)
    kept.add_argument("--backend", default="gloo", help="whose measurements (default: gloo)")
    kept.add_argument("--folder", type=Path, help="where they are kept (default: user's cache)")
    kept.add_argument("--json", action="store_true")
    calibrate = commands.add_parser(
        "calibrate", parents=[source, kept], help="time collectives here and keep the curves",
        description="Starts processes on this host and times a CPU backend among them.",
    )  # fmt: skip
    calibrate.add_argument("--ranks", type=int, default=2, help="processes (2)")
    calibrate.add_argument("--ops", default="all_reduce", metavar="OP,…", help="(all_reduce)")
    calibrate.add_argument("--smallest", type=byte_count, default=4 << 10, metavar="SIZE")
    calibrate.add_argument("--largest", type=byte_count, default=16 << 20, metavar="SIZE")
    calibrate.add_argument("--knots", type=int, default=12, help="most sizes of each op (12)")
    calibrate.add_argument("--repeats", type=int, default=7, help="times at each size (7)")
    calibrate.add_argument("--timeout", type=float, default=300.0, metavar="SECONDS")
    calibrate.set_defaults(run=_calibrate)
    predict = commands.add_parser(
        "predict", parents=[source, kept], help="how long a collective should take, and why"
    )
    predict.add_argument("--op", default="all_reduce", help="(all_reduce)")
    predict.add_argument("--bytes", type=byte_count, default=64 << 20, metavar="SIZE", help="(64M)")
    predict.add_argument(
        "--group", metavar="N|DEVICE,…", help="ranks, or their devices (default: all devices)"
    )
    predict.add_argument("--algorithm", help="only this one")
    predict.set_defaults(run=_predict)


def _calibrate(args: argparse.Namespace) -> int:
    from sagellm.comm.topology.calibration import find_switches
    from sagellm.comm.topology.live import calibrate_live, check_devices, library_of
    from sagellm.comm.topology.render import bytes_text

    check_devices(args.backend, args.ranks)
    info = read_topology(args)
    model, library = CostModel(info), library_of(args.backend)
    rows = calibrate_live(
        args.backend, args.ranks, ops=args.ops.split(","), smallest=args.smallest,
        largest=args.largest, knots=args.knots, repeats=args.repeats, timeout_s=args.timeout,
    )  # fmt: skip
    members = _members(info, args.backend, args.ranks)
    if members:
        rows = [{**row, "members": members} for row in rows]
    model.load(library, args.folder)
    drifted = model.drift(rows)
    measured = {(row["op"], row["algorithm"], row["group_size"]) for row in rows}
    for op, algorithm, size in measured:
        model.forget(op, algorithm, size, model.shape(members))
    model.observe(rows)
    path = model.save(library, args.folder)
    ops = list(dict.fromkeys(row["op"] for row in rows))
    jumps = {op: find_switches([row for row in rows if row["op"] == op]) for op in ops}
    if args.json:
        print(json.dumps({
            "schema": _CALIBRATION, "fingerprint": info.fingerprint, "library": library,
            "path": str(path), "drifted": [dataclasses.asdict(d) for d in drifted],
            "switches": {op: [dataclasses.asdict(s) for s in found] for op, found in jumps.items()},
            "rows": rows,
        }, indent=1))  # fmt: skip
        return 0
    from rich.console import Console

    console = Console(markup=False)
    for op in ops:
        console.print(_measured(model, op, args.backend, [r for r in rows if r["op"] == op]))
        for jump in jumps[op]:
            console.print(
                f"{op} jumps between {bytes_text(jump.below)} and {bytes_text(jump.above)}, to "
                f"{jump.factor:.2f} times what smaller payloads make expect", style="yellow",
            )  # fmt: skip
    for d in drifted:
        console.print(
            f"{d.op} had drifted: {d.ratio:.2f} times what was kept from before", style="yellow"
        )
    console.print(f"kept as {path}", style="dim", highlight=False, soft_wrap=True)
    return 0


def _members(info: TopologyInfo, backend: str, ranks: int) -> tuple[str, ...]:
    """Devices of the ranks: rank i of NCCL has device i; processes of the CPU have none."""
    if backend != "nccl":
        return ()
    seen = {d.visible_index: d.id for d in info.accelerators if d.visible_index is not None}
    found = tuple(seen[rank] for rank in range(ranks) if rank in seen)
    return found if len(set(found)) == ranks else ()


def _measured(model: CostModel, op: str, backend: str, rows: Sequence[Mapping[str, Any]]) -> object:
    from rich import box
    from rich.table import Table

    from sagellm.comm.topology.render import bytes_text

    size, algorithm = rows[0]["group_size"], rows[0]["algorithm"]
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title_justify="left",
        title=f"{op} of {size} ranks by {backend}",
    )
    for name in ("payload", "median", "fastest", "slowest", "bus bandwidth"):
        table.add_column(name, justify="right", no_wrap=True)
    for nbytes in sorted({row["nbytes"] for row in rows}):
        times = [row["time_us"] for row in rows if row["nbytes"] == nbytes]
        found = model.predict(op, nbytes, rows[0].get("members") or size, algorithm)
        spread = (f"{f(times):,.1f} us" for f in (median, min, max))
        table.add_row(bytes_text(nbytes), *spread, _rate(found))
    return table


def _predict(args: argparse.Namespace) -> int:
    info = read_topology(args)
    model = CostModel(info)
    notes = []
    try:
        from sagellm.comm.topology.live import library_of

        if not model.load(library_of(args.backend), args.folder):
            notes.append(
                f"nothing measured of {args.backend} on this topology: run `calibrate` for "
                "estimates that are more than orders of magnitude"
            )
    except BackendUnavailableError as e:
        notes.append(f"no measurements are looked up: {e}")
    group = _group(info, args.group)
    names = [args.algorithm] if args.algorithm else model.algorithms(args.op)
    found = {name: model.predict(args.op, args.bytes, group, name) for name in names}
    table = model.freeze([group])
    chosen = None if args.algorithm else model.select(table, args.op, args.bytes, group)[0]
    size = group if isinstance(group, int) else len(group)
    if args.json:
        print(json.dumps({
            "schema": _PREDICTION, "op": args.op, "nbytes": args.bytes, "group_size": size,
            "chosen": chosen, "notes": notes,
            "estimates": {name: dataclasses.asdict(e) for name, e in found.items()},
        }, indent=1))  # fmt: skip
        return 0
    from rich.console import Console

    console = Console(markup=False)
    console.print(_estimates(args.op, args.bytes, size, found, chosen))
    for note in notes:
        console.print(f"note: {note}", style="yellow", highlight=False)
    return 0


def _group(info: TopologyInfo, text: str | None) -> int | tuple[str, ...]:
    if text is None:
        return info.num_devices if info.num_devices > 1 else 2
    size = whole_number(text, most=_MOST_RANKS)
    if size is not None:
        return size
    return tuple(device_id(info, name) for name in text.split(","))


def _estimates(
    op: str, nbytes: int, size: int, found: Mapping[str, Estimate], chosen: str | None
) -> object:
    from rich import box
    from rich.table import Table

    from sagellm.comm.topology.render import bytes_text

    title = f"{op} of {bytes_text(nbytes)} over {size} ranks"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    table.add_column("algorithm", no_wrap=True)
    for name in ("time", "9 of 10 between", "bus bandwidth"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("basis")
    for name, e in sorted(found.items(), key=lambda x: (x[1].time_us, x[0])):
        mark = " (chosen)" if name == chosen else ""
        between = f"{e.low_us:,.0f} - {e.high_us:,.0f} us"
        style = "bold green" if mark else ""
        table.add_row(name + mark, f"{e.time_us:,.1f} us", between, _rate(e), e.basis, style=style)
    return table


def _rate(estimate: Estimate) -> str:
    rate = estimate.busbw_bytes_per_s
    return "" if rate is None else f"{rate / 1e9:,.2f} GB/s"
