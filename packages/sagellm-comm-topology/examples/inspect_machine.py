"""Prints what this machine is made of, and how its devices reach each other.

python inspect_machine.py            this machine
python inspect_machine.py --drawn    an eight-GPU server that exists only as files
"""

import argparse
import tempfile
from pathlib import Path

from rich.console import Console

from sagellm.comm.topology import TopologyManager
from sagellm.comm.topology.benchmarks.fake_machine import draw_hgx
from sagellm.comm.topology.cost_model import CostModel
from sagellm.comm.topology.render import render_matrix, render_svg, render_table


def main() -> None:
    """Show the table, the matrix, a path, a rank map and a prediction; write a drawing."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--drawn", action="store_true")
    parser.add_argument("--svg", type=Path, help="write the drawing here")
    args = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        root = draw_hgx(Path(folder) / "root", functions=80).root if args.drawn else "/"
        manager = TopologyManager(root=root)
        info = manager.detect()
    console.print(render_table(info))
    console.print(render_matrix(info))
    if args.svg:
        args.svg.write_text(render_svg(info), encoding="utf-8")
    gpus = info.accelerators
    if len(gpus) < 2:
        console.print("fewer than two accelerators: there is no path to explain")
        return
    path = manager.path(gpus[0].id, gpus[-1].id)
    nic = manager.nearest(gpus[0].id, "nic")
    console.print(f"{path.a} to {path.b}: {path.kind} in {path.hops} hops")
    console.print(f"nearest NIC of {gpus[0].id}: {nic.id if nic else 'none'}")
    console.print(f"ranks with tp=2: {', '.join(manager.rank_map(2, dp=len(gpus) // 2))}")
    model = CostModel(info)
    name, estimate = model.select(model.freeze(), "all_reduce", 64 << 20, len(gpus))
    console.print(
        f"64 MiB all_reduce: {name}, {estimate.time_us:.0f} us "
        f"({estimate.low_us:.0f} to {estimate.high_us:.0f}, basis {estimate.basis})"
    )


if __name__ == "__main__":
    main()
