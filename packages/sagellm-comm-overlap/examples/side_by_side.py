"""Eight layers whose results travel while the next layer computes: metrics, trace, picture.

Run it with a folder to write to: `python side_by_side.py out`.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from sagellm.comm.overlap import OverlapManager, render_timeline

LAYERS = 8


def main(folder: Path) -> None:
    """Compute layers, send them over a modelled link, and say what was hidden."""
    folder.mkdir(parents=True, exist_ok=True)
    x = torch.randn(256, 256)
    weights = [torch.randn(256, 256) for _ in range(LAYERS)]

    def layer(weight: torch.Tensor) -> torch.Tensor:
        y = x
        for _ in range(20):
            y = torch.tanh(y @ weight)
        return y

    with ThreadPoolExecutor(1) as link, OverlapManager(device="cpu", trace=True) as manager:

        def send(y: torch.Tensor) -> Future[None]:
            return link.submit(time.sleep, y.numel() * y.element_size() / 50e6)  # 50 MB/s

        graph = manager.graph()
        for at, weight in enumerate(weights):
            computed = graph.compute(lambda w=weight: layer(w), name=f"layer {at}")
            graph.comm(send, computed, name=f"send {at}", nbytes=x.numel() * x.element_size())
        plan = manager.compile(graph)
        plan = manager.compile(graph, costs=manager.calibrate(plan))
        sys.stdout.write(manager.explain(plan) + "\n")
        handle = manager.run(plan)
        handle.wait()
        metrics = handle.metrics
        sys.stdout.write(
            f"{metrics.makespan_s * 1e3:.1f} ms; eff_trace {metrics.eff_trace:.2f}, "
            f"eff_saved {metrics.eff_saved:.2f}, bound_ratio {metrics.bound_ratio:.2f}\n"
        )
        manager.write_trace(folder / "trace.json")
        picture = render_timeline(metrics.intervals, "Eight layers, sent as they are computed")
        (folder / "timeline.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "overlap-out"))
