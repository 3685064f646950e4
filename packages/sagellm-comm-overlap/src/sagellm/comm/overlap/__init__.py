"""Runs compute and communication side by side and measures how much was hidden."""

from ._version import __version__ as __version__
from .handle import RunHandle as RunHandle
from .kv_hooks import LayerHook as LayerHook
from .manager import LaneInfo as LaneInfo, OverlapManager as OverlapManager
from .metrics import eff_attainable as eff_attainable, measure as measure, stretch as stretch
from .orders import (
    johnson_order as johnson_order,
    lower_bound as lower_bound,
    simulate as simulate,
    upward_rank as upward_rank,
)
from .policy import OverlapPolicy as OverlapPolicy
from .scheduler import (
    StaticPlan as StaticPlan,
    TaskGraph as TaskGraph,
    TaskSpec as TaskSpec,
    compile_graph as compile_graph,
    lane_kind as lane_kind,
)
from .timeline_svg import render_timeline as render_timeline
from .trace import (
    TraceRun as TraceRun,
    merge_chrome_traces as merge_chrome_traces,
    write_chrome_trace as write_chrome_trace,
)

__all__ = [
    "LaneInfo",
    "LayerHook",
    "OverlapManager",
    "OverlapPolicy",
    "RunHandle",
    "StaticPlan",
    "TaskGraph",
    "TaskSpec",
    "TraceRun",
    "__version__",
    "compile_graph",
    "eff_attainable",
    "johnson_order",
    "lane_kind",
    "lower_bound",
    "measure",
    "merge_chrome_traces",
    "render_timeline",
    "simulate",
    "stretch",
    "upward_rank",
    "write_chrome_trace",
]
