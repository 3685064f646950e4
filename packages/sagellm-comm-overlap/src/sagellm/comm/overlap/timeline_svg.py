"""A picture of lanes over time, as SVG that any browser opens. No dependency, no script."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from sagellm.core.protocols import Interval

from .metrics import measure
from .scheduler import lane_kind
from .trace import rows_of

__all__ = ["render_timeline"]

_FILL = {"compute": "#3b7dd8", "comm": "#e0832d"}
_EDGE = {"compute": "#245a9f", "comm": "#a85c17"}
_WORD = {"compute": "compute", "comm": "communication"}
_ROW, _GAP, _TOP, _RIGHT, _FOOT = 24, 12, 66, 24, 44
_CHAR = 6.3  # average glyph of the 11 px font below, generous


def render_timeline(intervals: Iterable[Interval], title: str = "", *, width: int = 1100) -> str:
    """A standalone SVG document with one band per lane and one bar per task.

    Lanes whose last path component begins with `compute` are blue, others orange. Compute lanes
    come first within a rank (`rank0/compute` before `rank0/comm`); communications in flight at
    the same time stack inside their band. Hovering over a bar names the task, its times and its
    bytes. The axis is in milliseconds from the earliest start.

    Args:
        intervals: What ran when.
        title: Headline.
        width: Pixels.

    """
    items = sorted(intervals, key=lambda item: (item.start_s, item.end_s))
    origin = min((item.start_s for item in items), default=0.0)
    span_ms = max((item.end_s - origin for item in items), default=0.0) * 1e3 or 1.0
    rows = rows_of(items)
    depth: dict[str, int] = {}
    for lane, row in rows:
        depth[lane] = max(depth.get(lane, 0), row + 1)
    lanes = sorted(depth, key=_lane_key)
    left = max([70, *(int(len(lane) * 7.2) + 28 for lane in lanes)])
    scale = (width - left - _RIGHT) / span_ms
    top: dict[str, int] = {}
    y = _TOP
    for lane in lanes:
        top[lane] = y
        y += depth[lane] * _ROW + _GAP
    height = y + _FOOT
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="system-ui, sans-serif" font-size="11">',
        f"<title>{escape(title or 'timeline')}</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="16" y="26" font-size="16" font-weight="600" fill="#1c2430">'
        f"{escape(title)}</text>",
        *_legend(items),
        *_axis(span_ms, scale, left, _TOP - 6, y),
    ]
    for at, lane in enumerate(lanes):
        band = depth[lane] * _ROW
        shade = "#f4f6f9" if at % 2 == 0 else "#eaeef4"
        out.append(
            f'<rect x="{left}" y="{top[lane]}" width="{width - left - _RIGHT}" height="{band}" '
            f'fill="{shade}" fill-opacity="0.6"/>'
        )
        out.append(
            f'<text x="{left - 10}" y="{top[lane] + band / 2 + 4:.1f}" text-anchor="end" '
            f'font-size="12" font-weight="600" fill="#1c2430">{escape(lane)}</text>'
        )
    for (lane, row), bars in rows.items():
        for item in bars:
            out.append(_bar(item, origin, scale, left, top[lane] + row * _ROW))
    out.append("</svg>")
    return "\n".join(out)


def _lane_key(lane: str) -> tuple[str, bool, str]:
    prefix, _, name = lane.rpartition("/")
    return prefix, lane_kind(lane) == "comm", name


def _legend(items: list[Interval]) -> list[str]:
    metrics = measure(items)
    hidden = (
        "" if metrics.eff_trace is None else f", {metrics.eff_trace:.0%} of communication hidden"
    )
    note = f"{len(items)} tasks in {metrics.makespan_s * 1e3:.2f} ms{hidden}"
    out = []
    x = 16
    for kind in ("compute", "comm"):
        out.append(f'<rect x="{x}" y="36" width="12" height="12" rx="2" fill="{_FILL[kind]}"/>')
        out.append(f'<text x="{x + 17}" y="46" fill="#44505f">{_WORD[kind]}</text>')
        x += 40 + int(len(_WORD[kind]) * _CHAR)
    out.append(f'<text x="{x + 6}" y="46" fill="#44505f">{escape(note)}</text>')
    return out


def _axis(span_ms: float, scale: float, left: int, top: int, bottom: int) -> list[str]:
    step = _nice_step(span_ms)
    digits = 0 if step >= 1 else min(6, len(f"{step:.9f}".rstrip("0").split(".")[1]))
    out = []
    for tick in range(int(span_ms / step + 1e-9) + 1):
        x = left + tick * step * scale
        out.append(f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}" stroke="#d3dae3"/>')
        out.append(
            f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle" fill="#44505f">'
            f"{tick * step:.{digits}f}</text>"
        )
    middle = left + span_ms * scale / 2
    out.append(
        f'<text x="{middle:.1f}" y="{bottom + 33}" text-anchor="middle" fill="#44505f">'
        "time in ms</text>"
    )
    return out


def _nice_step(span_ms: float) -> float:
    """A step of 1, 2 or 5 times a power of ten that gives 5 to 12 ticks.

    >>> _nice_step(96.0), _nice_step(0.7)
    (10.0, 0.1)
    """
    step = 1e-6
    while True:
        for factor in (1, 2, 5):
            if span_ms / (step * factor) <= 12:
                return round(step * factor, 9)
        step *= 10


def _bar(item: Interval, origin: float, scale: float, left: int, y: int) -> str:
    kind = lane_kind(item.lane)
    start_ms, took_ms = (item.start_s - origin) * 1e3, (item.end_s - item.start_s) * 1e3
    x, wide = left + start_ms * scale, max(took_ms * scale, 1.0)
    moved = f", {item.nbytes} bytes" if item.nbytes else ""
    hover = f"{item.name} on {item.lane}: {start_ms:.3f} ms + {took_ms:.3f} ms{moved}"
    room = int((wide - 8) / _CHAR)
    label = item.name if len(item.name) <= room else f"{item.name[: room - 1]}…" if room > 3 else ""
    text = (
        f'<text x="{x + wide / 2:.1f}" y="{y + 16}" text-anchor="middle" fill="#ffffff" '
        f'pointer-events="none">{escape(label)}</text>'
    )
    return (
        f'<g><title>{escape(hover)}</title><rect x="{x:.1f}" y="{y + 2}" width="{wide:.1f}" '
        f'height="{_ROW - 4}" rx="2" fill="{_FILL[kind]}" stroke="{_EDGE[kind]}" '
        f'stroke-width="0.5"/>{text if label else ""}</g>'
    )
