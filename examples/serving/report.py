"""What a run shows on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sagellm.core.protocols import TopologyInfo
from serving.messages import Job, Ready
from serving.router import Overlap, Request

_MOST_ROWS = 16
_TOO_WIDE = 1.0


def _table(title: str, **columns: str) -> Table:
    """A table; columns are names and how to justify them, `_` standing for a space."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for name, justify in columns.items():
        table.add_column(
            name.replace("_", " "),
            justify="right" if justify == "right" else "left",
            overflow="fold",
        )
    return table


def show_topology(console: Console, topology: TopologyInfo) -> None:
    """The devices of this host, and what could not be read."""
    took_s = sum(topology.provenance.values())
    sources = ", ".join(topology.provenance)
    table = _table(
        f"Topology: {topology.num_devices} accelerators, {len(topology.links)} links "
        f"({sources or 'no source'}, {took_s * 1e3:.0f} ms)",
        device="left", kind="left", what="left", NUMA="right", CPUs="left", links="left",
    )  # fmt: skip
    for device in topology.devices[:_MOST_ROWS]:
        kinds: dict[str, int] = {}
        for link in topology.links:
            if device.id in (link.a, link.b):
                kinds[link.kind] = kinds.get(link.kind, 0) + link.count
        what = " ".join(filter(None, (device.vendor, device.model)))
        table.add_row(
            escape(device.id),
            device.kind,
            escape(what) or "-",
            ",".join(map(str, device.numa_nodes)) or "-",
            device.cpulist or "-",
            ", ".join(f"{kind} x{count}" for kind, count in kinds.items()) or "-",
        )
    console.print(table)
    if len(topology.devices) > _MOST_ROWS:
        console.print(f"  and {len(topology.devices) - _MOST_ROWS} devices more")
    for warning in topology.warnings:
        console.print(f"  [dim]{escape(warning)}[/dim]", highlight=False)


def show_ranks(console: Console, job: Job, ready: Mapping[int, Ready]) -> None:
    """Who holds what, and the backend with its reason."""
    first = ready[0]
    console.print(
        f"[bold]Backend[/bold] {first.backend}, algorithm {first.algorithm}: "
        f"{escape(first.reason)}",
        highlight=False,
    )
    table = _table(
        "Ranks",
        rank="right", role="left", pid="right", KV_heads="left", parameters="right",
        at_most="right", KV_goes_to="left",
    )  # fmt: skip
    for rank, r in sorted(ready.items()):
        table.add_row(
            str(rank),
            job.role(rank),
            str(r.pid),
            ",".join(map(str, r.kv_heads)),
            f"{r.parameter_bytes / 1e6:.2f} MB",
            f"{r.parameter_bytes_bound / 1e6:.2f} MB",
            ", ".join(f"rank {to} ({path})" for to, path in r.paths.items()) or "-",
        )
    console.print(table)


def show_requests(
    console: Console, job: Job, requests: Sequence[Request], expected: Sequence[Sequence[int]]
) -> None:
    """One line per request."""
    table = _table(
        f"Requests: codec {job.codec}, transport {job.transport}",
        request="left", prompt="right", KV_bytes="right", wire_bytes="right", ratio="right",
        MB_per_s="right", first_token="right", tokens_per_s="right", tokens="left",
    )  # fmt: skip
    for request, wanted in zip(requests, expected, strict=True):
        rate = request.tokens_per_s
        equal = request.tokens == list(wanted)
        table.add_row(
            escape(request.id),
            f"{len(request.prompt)} tok",
            f"{request.kv_bytes:,}",
            f"{request.wire_bytes:,}",
            f"{request.kv_bytes / request.wire_bytes:.3f}",
            f"{request.bytes_per_s / 1e6:.0f}",
            f"{request.time_to_first_token_s * 1e3:.0f} ms",
            "-" if rate is None else f"{rate:.0f}",
            "[green]equal[/green]" if equal else "[bold red]differ[/bold red]",
        )
    console.print(table)


def show_overlap(console: Console, overlap: Overlap) -> None:
    """How much of the sending was hidden, and what that rests on."""
    console.print(
        f"[bold]Overlap[/bold] of streaming KV with prefill, {overlap.prompt_tokens} tokens, "
        f"medians of {overlap.rounds} rounds: "
        f"compute alone {overlap.compute_s * 1e3:.1f} ms, sending alone "
        f"{overlap.comm_s * 1e3:.1f} ms, together {overlap.overlapped_s * 1e3:.1f} ms",
        highlight=False,
    )
    trace, saved = _percent(overlap.eff_trace), _percent(overlap.eff_saved)
    low, high = overlap.eff_saved_quartiles
    console.print(
        f"  eff_trace {trace} of the sending ran beside computation; "
        f"eff_saved {saved} of its time was saved "
        f"(middle half of the rounds: {_percent(low)} to {_percent(high)})",
        highlight=False,
    )
    if low is None or high is None or high - low > _TOO_WIDE:
        console.print(
            "  [dim]the rounds differ too much to judge by eff_saved: sending is short beside "
            "computing, and the machine is busy[/dim]",
            highlight=False,
        )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def show_verdict(
    console: Console,
    job: Job,
    requests: Sequence[Request],
    expected: Sequence[Sequence[int]],
    files: Sequence[Path],
    elapsed_s: float,
) -> None:
    """Whether the tokens are those of a single process, and where the pictures are."""
    console.print("Files: " + ", ".join(map(str, files)), highlight=False, soft_wrap=True)
    different = [r.id for r, w in zip(requests, expected, strict=True) if r.tokens != list(w)]
    shape = f"prefill on {job.tp_prefill}, decode on {job.tp_decode}"
    if not different:
        console.print(
            f"[bold green]Tokens equal[/bold green] to a single process's for all "
            f"{len(requests)} requests ({shape}, {elapsed_s:.1f} s)",
            highlight=False,
        )
        return
    why = ""
    if job.sabotage_layer is not None:
        why = f": the KV of layer {job.sabotage_layer} was zeroed on purpose"
    console.print(
        f"[bold red]Tokens differ[/bold red] from a single process's in "
        f"{len(different)} of {len(requests)} requests ({', '.join(different)}){why}",
        highlight=False,
    )
