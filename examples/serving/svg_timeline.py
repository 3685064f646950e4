"""The timeline of a run as an SVG: a row per rank and lane, a colour per request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

from serving.messages import Job, Span
from serving.trace import LANES

Scale = Callable[[float], float]

COLOURS = ("#3b6fb6", "#d9822b", "#3f8f5f", "#8a5fb0", "#c2476a", "#2f8f9d", "#7a7f35", "#7d5a45")
_LEFT, _RIGHT, _TOP = 224, 24, 96
_WIDTH = 1200
_ROW, _GAP, _BETWEEN_RANKS = 26, 5, 14
_INK, _FAINT, _GRID = "#1f2933", "#66727f", "#e3e7eb"


def write_timeline(
    path: Path, job: Job, spans: Mapping[int, Sequence[Span]], requests: Sequence[str]
) -> None:
    """Draw what every rank did when.

    Args:
        path: Where to write it.
        job: The job, for ranks and roles.
        spans: What each rank did.
        requests: Names of the requests, in the order of the legend.

    """
    everything = [s for of_rank in spans.values() for s in of_rank]
    begin_s = min((s.start_s for s in everything), default=0.0)
    total_s = max((s.end_s for s in everything), default=1.0) - begin_s or 1.0
    plot = _WIDTH - _LEFT - _RIGHT

    def x(at_s: float) -> float:
        return _LEFT + (at_s - begin_s) / total_s * plot

    parts: list[str] = []
    y = _TOP
    rows_end = y
    for rank in range(job.world_size):
        of_rank = spans.get(rank, ())
        lanes = [lane for lane in LANES if any(s.lane == lane for s in of_rank)]
        label = f"rank {rank} · {job.role(rank)}"
        parts.append(svg_text(20, y + _ROW * 0.68, label, weight=600))
        for lane in lanes:
            parts.append(svg_text(_LEFT - 10, y + _ROW * 0.68, lane, anchor="end", fill=_FAINT))
            parts.append(
                f'<rect x="{_LEFT}" y="{y}" width="{plot}" height="{_ROW}" rx="3" fill="#f4f6f8"/>'
            )
            for span in of_rank:
                if span.lane == lane:
                    parts.append(_bar(span, x, y, _colour(span.request, requests)))
            rows_end = y + _ROW
            y += _ROW + _GAP
        y += _BETWEEN_RANKS
    height = rows_end + 56
    head = [
        svg_text(20, 34, "Disaggregated serving: what each rank did when", size=19, weight=600),
        _legend(requests),
        *_axis(total_s, rows_end, x, begin_s),
    ]
    body = "\n".join([*head, *parts])
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" font-family="system-ui, sans-serif" font-size="13">\n'
        f'<rect width="100%" height="100%" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


def _bar(span: Span, x: Scale, y: float, colour: str) -> str:
    left, width = x(span.start_s), max(0.8, x(span.end_s) - x(span.start_s))
    ms = (span.end_s - span.start_s) * 1e3
    moved = f", {span.nbytes / 1e6:.2f} MB" if span.nbytes else ""
    title = escape(f"{span.request}: {span.name}, {ms:.2f} ms{moved}")
    edge = ' stroke="#ffffff" stroke-width="0.6"' if width > 3 else ""
    return (
        f'<rect x="{left:.2f}" y="{y + 3}" width="{width:.2f}" height="{_ROW - 6}" rx="1.5" '
        f'fill="{colour}"{edge}><title>{title}</title></rect>'
    )


def _colour(request: str, requests: Sequence[str]) -> str:
    return COLOURS[requests.index(request) % len(COLOURS)] if request in requests else _FAINT


def _legend(requests: Sequence[str]) -> str:
    parts, left = [], 20.0
    for name in requests:
        colour = _colour(name, requests)
        parts.append(f'<rect x="{left:.0f}" y="52" width="14" height="14" rx="3" fill="{colour}"/>')
        parts.append(svg_text(left + 20, 64, name))
        left += 44 + 7.4 * len(name)
    return "\n".join(parts)


def _axis(total_s: float, bottom: float, x: Scale, begin_s: float) -> list[str]:
    step_s = next(s for s in _steps() if total_s / s <= 12)
    parts = []
    for i in range(int(total_s / step_s) + 1):
        at = x(begin_s + i * step_s)
        parts.append(
            f'<line x1="{at:.1f}" y1="{_TOP - 8}" x2="{at:.1f}" y2="{bottom + 8}" '
            f'stroke="{_GRID}"/>'
        )
        label = f"{i * step_s * 1e3:g} ms" if step_s < 1 else f"{i * step_s:g} s"
        parts.append(svg_text(at, bottom + 26, label, anchor="middle", fill=_FAINT, size=12))
    return parts


def _steps() -> list[float]:
    return [m * 10.0**e for e in range(-4, 6) for m in (1, 2, 5)]


def svg_text(
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "start",
    fill: str = _INK,
    size: int = 13,
    weight: int = 400,
) -> str:
    """Returns a text element; `y` is its baseline."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor={quoteattr(anchor)} fill="{fill}" '
        f'font-size="{size}" font-weight="{weight}">{escape(text)}</text>'
    )
