"""The command that simulates algorithms on a cluster and draws how they scale."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import time

from sagellm.comm.topology.cluster import ClusterShape, make_cluster
from sagellm.comm.topology.planning import Plan, PlanRow, plan
from sagellm.core.protocols import TopologyInfo

from ._source import Commands, byte_count, count_up_to, read_topology

__all__ = ["add_commands"]

_SCHEMA = "sagellm.topology.plan/1"

_MOST_HOSTS, _MOST_PER_HOST = 4096, 64


def add_commands(commands: Commands, source: argparse.ArgumentParser) -> None:
    """Add `plan`."""
    parser = commands.add_parser(
        "plan", parents=[source], help="simulate algorithms on a cluster, and how they scale",
        description="Simulates a cluster of equal hosts: drawn ones, or copies of the host that "
        "--from names.",
    )  # fmt: skip
    parser.add_argument(
        "--nodes", type=count_up_to(_MOST_HOSTS), default=8, help="hosts (default: 8)"
    )
    parser.add_argument("--op", default="all_reduce", help="operation (default: all_reduce)")
    parser.add_argument(
        "--bytes", type=byte_count, default=256 << 20, metavar="SIZE", help="payload (256M)"
    )
    parser.add_argument("--algorithms", metavar="NAME,…", help="only these")
    drawn = ClusterShape()
    parser.add_argument(
        "--gpus", type=count_up_to(_MOST_PER_HOST), default=drawn.gpus, help="per host (8)"
    )
    parser.add_argument(
        "--nics", type=count_up_to(_MOST_PER_HOST), help="ports per host (one for each GPU)"
    )
    for name, value, what in (
        ("fabric", drawn.fabric_bytes_per_s, "of a GPU into its host's fabric; 0: none"),
        ("pcie", drawn.pcie_bytes_per_s, "of a PCIe link"),
        ("port", drawn.nic_bytes_per_s, "of a network port"),
    ):
        parser.add_argument(
            f"--{name}", type=float, default=value / 1e9, metavar="GB/s",
            help=f"bandwidth {what} ({value / 1e9:g})",
        )  # fmt: skip
    parser.add_argument(
        "--rack",
        type=count_up_to(_MOST_HOSTS),
        default=drawn.rack_nodes,
        help="hosts in a rack (32)",
    )
    parser.add_argument(
        "--oversubscription", type=float, default=1.0, metavar="RATIO",
        help="ports of a leaf switch over its way to the spine (1)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    names = args.algorithms.split(",") if args.algorithms else None
    gc.disable()  # all objects live to the end, and looking at them costs a third
    cluster, assumed = _cluster(args)
    found = plan(cluster, args.op, args.bytes, algorithms=names)
    found = dataclasses.replace(found, assumed=(*assumed, *found.assumed))
    elapsed_s, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
    if args.json:
        rows = [dataclasses.asdict(row) for row in found.rows]
        print(json.dumps({
            "schema": _SCHEMA, "op": found.op, "nbytes": found.nbytes, "assumed": found.assumed,
            "elapsed_s": elapsed_s, "cpu_s": cpu_s, "best": _best(found), "rows": rows,
        }, indent=1))  # fmt: skip
    else:
        _show(found, elapsed_s, cpu_s)
    return 0


def _best(found: Plan) -> list[dict[str, object]]:
    """The fastest algorithm by number of hosts, of which ones, and which were left out why."""
    told: list[dict[str, object]] = []
    for nodes in sorted({row.nodes for row in found.rows}):
        best = found.best(nodes)
        told.append({
            "nodes": nodes,
            "algorithm": best.algorithm if best else None,
            "of_simulated": [
                r.algorithm for r in found.rows if r.nodes == nodes and r.time_us is not None
            ],
            "left_out": {r.algorithm: r.left_out for r in found.left_out(nodes)},
        })  # fmt: skip
    return told


def _cluster(args: argparse.Namespace) -> tuple[TopologyInfo, tuple[str, ...]]:
    """What is simulated, and what of it was assumed."""
    if args.source:
        from sagellm.comm.topology._copies import copies_of

        host = read_topology(args)
        return (host, ()) if host.num_nodes > 1 else copies_of(host, args.nodes)
    drawn = make_cluster(
        ClusterShape(
            nodes=args.nodes,
            gpus=args.gpus,
            nics=args.gpus if args.nics is None else args.nics,
            fabric_bytes_per_s=args.fabric * 1e9,
            pcie_bytes_per_s=args.pcie * 1e9,
            nic_bytes_per_s=args.port * 1e9,
            rack_nodes=args.rack,
            oversubscription=args.oversubscription,
        )
    )
    return drawn, ()


def _show(found: Plan, elapsed_s: float, cpu_s: float) -> None:
    from rich.console import Console

    from sagellm.comm.topology._chart import chart
    from sagellm.comm.topology.render import bytes_text

    console = Console(markup=False)
    nodes = max(row.nodes for row in found.rows)
    console.print(_table(found, nodes, bytes_text(found.nbytes)))
    counts = sorted({row.nodes for row in found.rows})
    curves = {
        name: points
        for name in dict.fromkeys(row.algorithm for row in found.rows)
        if (
            points := [
                (r.nodes, r.time_us) for r in found.rows if r.algorithm == name and r.time_us
            ]
        )
    }
    if len(counts) > 1:
        width = max(20, min(64, console.width - 16))
        console.print(chart(curves, xs=counts, unit="us", width=width))
        of = " of those simulated" if found.left_out() else ""
        console.print(" " * 11 + f"hosts; fastest{of}: {_fastest(found, counts)}", highlight=False)
    for note in _left_out(found):
        console.print(note, style="yellow", highlight=False)
    if found.assumed:
        console.print(f"assumed, as nobody stated it: {', '.join(found.assumed)}")
    took = f"simulated in {elapsed_s:.1f} s ({cpu_s:.1f} s of CPU)"
    console.print(took, style="dim", highlight=False)


def _left_out(found: Plan) -> list[str]:
    """A sentence for each algorithm that was not simulated everywhere."""
    notes = []
    for name in dict.fromkeys(row.algorithm for row in found.left_out()):
        rows = [row for row in found.left_out() if row.algorithm == name]
        where = " and ".join(", ".join(str(row.nodes) for row in rows).rsplit(", ", 1))
        notes.append(
            f"not simulated, and perhaps faster: {name} on {where} hosts "
            f"({rows[-1].nodes} hosts: {rows[-1].left_out})"
        )
    return notes


def _fastest(found: Plan, counts: list[int]) -> str:
    """`two_shot to 1, hierarchical to 512`: the fastest algorithm by number of hosts."""
    spans: list[tuple[str, int]] = []
    for count in counts:
        best = found.best(count)
        name = best.algorithm if best else "?"
        if spans and spans[-1][0] == name:
            spans.pop()
        spans.append((name, count))
    return ", ".join(f"{name} to {count}" for name, count in spans)


def _table(found: Plan, nodes: int, payload: str) -> object:
    from rich import box
    from rich.table import Table

    rows = [row for row in found.rows if row.nodes == nodes]
    best = found.best(nodes)
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left",
        title=f"{found.op} of {payload} on {nodes} hosts, {rows[0].ranks} accelerators",
    )  # fmt: skip
    table.add_column("algorithm", no_wrap=True)
    against = "against best" + (" of those simulated" if found.left_out(nodes) else "")
    for name in ("time", "bus bandwidth", against):
        table.add_column(name, justify="right", overflow="fold")
    for row in sorted(rows, key=_merit):
        if row.time_us is None or best is None or not best.time_us:
            table.add_row(
                row.algorithm, "not simulated" if row.left_out else "0 us", "", "", style="dim"
            )
            continue
        rate = f"{(row.busbw_bytes_per_s or 0) / 1e9:.1f} GB/s"
        slower = f"{row.time_us / best.time_us:.2f} x" if row is not best else "best"
        style = "bold green" if row is best else ""
        table.add_row(row.algorithm, _time_text(row.time_us), rate, slower, style=style)
    return table


def _merit(row: PlanRow) -> tuple[bool, float, str]:
    return row.time_us is None, row.time_us or 0.0, row.algorithm


def _time_text(time_us: float) -> str:
    return f"{time_us / 1e3:,.2f} ms" if time_us >= 1e4 else f"{time_us:,.1f} us"
