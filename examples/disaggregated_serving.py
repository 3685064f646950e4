"""Disaggregated serving on this machine: prefill ranks, decode ranks, and KV between them.

    python examples/disaggregated_serving.py --tp-prefill 2 --tp-decode 1 --codec zstd

Prefill ranks split a small Llama between them, compute each prompt, and stream every layer's KV
to the decode ranks while they compute the next. A decode rank gets KV and one token, never the
prompt, and makes the others. At the end the tokens are compared with those of one process.

Exit status: 0 when they are equal, 1 when they are not, 2 for bad arguments, 3 when a rank or a
transfer failed, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from llama_config import LlamaConfig, LlamaShard
from llama_tp import TINY_LLAMA, LlamaTP, generate_greedy
from rich.console import Console
from rich.markup import escape
from serving.messages import Job
from serving.processes import Fleet
from serving.progress import Progress
from serving.prompts import Prompt, load_prompts
from serving.report import (
    show_overlap,
    show_ranks,
    show_requests,
    show_topology,
    show_verdict,
)
from serving.result import SCHEMA, BackendResult, DemoResult, OverlapResult, RequestResult
from serving.router import Overlap, Request, Router
from serving.svg_timeline import write_timeline
from serving.svg_topology import Flow, write_topology
from serving.trace import write_trace

from sagellm.comm.kv_transfer import create_codec
from sagellm.comm.kv_transfer.transports import load_spec
from sagellm.comm.topology import TopologyManager
from sagellm.core.protocols import BackendUnavailableError, CommError, ConfigError
from sagellm.core.protocols.selection import backend_registry

_PAGE_TOKENS = 16
_START_S = 180.0
_MEASURE_TOKENS, _MEASURE_ROUNDS = 512, 15


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo and returns its exit status."""
    args = _parse(argv)
    console = Console(stderr=False)
    try:
        with _ending_on_signals():
            return _run(args, console)
    except CommError as e:
        said = escape(f"[{e.code}] {e}")
        console.print(f"[bold red]error[/bold red] {said}", highlight=False, soft_wrap=True)
        return 2 if isinstance(e, ConfigError) else 3
    except KeyboardInterrupt:
        console.print("interrupted: every rank has been ended")
        return 130


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Prefill on some ranks, decode on others, KV streamed between them."
    )
    add = parser.add_argument
    add("--prompt", action="append", default=[], help="a prompt; may be repeated (default: five)")
    add("--max-new-tokens", type=int, default=32, metavar="N", help="tokens to make per prompt")
    add("--tp-prefill", type=int, default=2, metavar="N", help="prefill ranks (default: 2)")
    add("--tp-decode", type=int, default=1, metavar="N", help="decode ranks (default: 1)")
    add("--backend", default="auto", help="collective backend: auto, gloo, … (default: auto)")
    add("--codec", default="none", help="codec of the KV: none, lz4 or zstd (default: none)")
    add("--transport", default="tcp", help="transport of the KV, or auto (default: tcp)")
    add("--sabotage-layer", type=int, metavar="I", help="zero the received KV of this layer")
    add("--checkpoint", type=Path, default=TINY_LLAMA, help="a Llama with tokenizer.json")
    add("--out", type=Path, default=Path("demo-out"), help="folder for trace and pictures")
    add("--json", type=Path, metavar="FILE", help=f"write the result ({SCHEMA})")
    return parser.parse_args(argv)


@contextmanager
def _ending_on_signals() -> Iterator[None]:
    """Treats SIGTERM and SIGHUP as Ctrl-C, so that ranks are ended then too."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {n: signal.signal(n, interrupt) for n in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(args: argparse.Namespace, console: Console) -> int:
    begin_s = time.monotonic()
    job, prompts = _prepare(args)
    model = LlamaTP(args.checkpoint)
    topology = TopologyManager().detect()
    show_topology(console, topology)
    requests = [Request(p.title, p.tokens) for p in prompts]
    longest = max((p.tokens for p in prompts), key=len)
    steps = model.config.num_layers + args.max_new_tokens
    progress = Progress(console, job.world_size, {r.id: steps for r in requests})
    with progress, Fleet(job) as fleet:
        router = Router(fleet, progress)
        expected = _single_process(model, prompts, args.max_new_tokens)
        router.wait_until_ready(_START_S)
        show_ranks(console, job, router.ready)
        router.warm_up(longest[:_PAGE_TOKENS])
        router.serve(requests, args.max_new_tokens)
        overlap = router.measure_overlap(longest[:_MEASURE_TOKENS], _MEASURE_ROUNDS)
        spans = router.stop()
    show_requests(console, job, requests, expected)
    show_overlap(console, overlap)

    args.out.mkdir(parents=True, exist_ok=True)
    files = [args.out / name for name in ("trace.json", "timeline.svg", "topology.svg")]
    write_trace(files[0], job, spans)
    write_timeline(files[1], job, spans, [r.id for r in requests])
    write_topology(files[2], job, router.ready, _flows(router, requests), topology)
    result = _result(job, router, requests, expected, overlap, files)
    if args.json is not None:
        result.write(args.json)
    show_verdict(console, job, requests, expected, files, time.monotonic() - begin_s)
    return 0 if result.tokens_equal else 1


def _prepare(args: argparse.Namespace) -> tuple[Job, list[Prompt]]:
    """Checks everything that can be checked before a process is started."""
    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {args.max_new_tokens} must be at least 1")
    config = LlamaConfig.load(args.checkpoint)
    for tp_size in (args.tp_prefill, args.tp_decode):
        LlamaShard.of(config, tp_size, 0)
    layer = args.sabotage_layer
    if layer is not None and not 0 <= layer < config.num_layers:
        raise ConfigError(f"--sabotage-layer {layer} is not in 0..{config.num_layers - 1}")
    if args.backend != "auto":
        _check_backend(args.backend)
    create_codec(args.codec)
    if args.transport != "auto":
        load_spec(args.transport)
    prompts, _ = load_prompts(args.checkpoint, args.prompt)
    lengths = [len(p.tokens) + args.max_new_tokens for p in prompts]
    if max(lengths) > config.max_positions:
        raise ConfigError(
            f"a prompt with its {args.max_new_tokens} new tokens needs {max(lengths)} positions; "
            f"the model has {config.max_positions}"
        )
    blocks = [-(-n // _PAGE_TOKENS) for n in lengths]
    world_size = args.tp_prefill + args.tp_decode
    job = Job(
        checkpoint=str(args.checkpoint.absolute()),
        tp_prefill=args.tp_prefill,
        tp_decode=args.tp_decode,
        backend=args.backend,
        codec=args.codec,
        transport=args.transport,
        # one prompt at a time in prefill; in decode all that may wait, and the measurement's
        prefill_blocks=max(blocks),
        decode_blocks=sum(blocks) + 4 * max(blocks),
        page_tokens=_PAGE_TOKENS,
        threads=max(1, (os.cpu_count() or 1) // world_size),
        sabotage_layer=layer,
    )
    return job, prompts


def _check_backend(name: str) -> None:
    spec = backend_registry().load(name)
    if "cpu" not in spec.device_types:
        raise ConfigError(
            f"backend {name!r} serves {', '.join(spec.device_types)}; the demo computes on the CPU"
        )
    probe = spec.probe()
    if not probe.available:
        raise BackendUnavailableError(f"backend {name!r}: {probe.reason}; {spec.install_hint}")


def _single_process(
    model: LlamaTP, prompts: Sequence[Prompt], max_new_tokens: int
) -> list[list[int]]:
    """What one process makes of the prompts: what the ranks' tokens must equal."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the ranks are starting meanwhile
    made = []
    for prompt in prompts:
        cache = model.new_cache(-(-(len(prompt.tokens) + max_new_tokens) // _PAGE_TOKENS))
        sequence = cache.new_sequence()
        made.append(generate_greedy(model, prompt.tokens, max_new_tokens, sequence, stop_ids=()))
    torch.set_num_threads(threads)
    return made


def _flows(router: Router, requests: Sequence[Request]) -> list[Flow]:
    """KV per pair of ranks; a rank's heads are spread evenly over the ranks it sends to."""
    flows = []
    for rank, ready in router.ready.items():
        total = sum(r.prefilled[rank].kv_bytes for r in requests if rank in r.prefilled)
        flows += [
            Flow(rank, target, total // len(ready.paths), path)
            for target, path in ready.paths.items()
        ]
    return flows


def _result(
    job: Job,
    router: Router,
    requests: Sequence[Request],
    expected: Sequence[Sequence[int]],
    overlap: Overlap,
    files: Sequence[Path],
) -> DemoResult:
    first = router.ready[0]
    return DemoResult(
        schema=SCHEMA,
        tokens_equal=all(r.tokens == list(w) for r, w in zip(requests, expected, strict=True)),
        requests=[
            RequestResult(
                prompt_tokens=len(r.prompt),
                tokens=r.tokens,
                kv_bytes=r.kv_bytes,
                wire_bytes=r.wire_bytes,
                ratio=r.kv_bytes / r.wire_bytes,
                bytes_per_s=r.bytes_per_s,
                time_to_first_token_s=r.time_to_first_token_s,
                tokens_per_s=r.tokens_per_s,
            )
            for r in requests
        ],
        backend=BackendResult(first.backend, first.algorithm, first.reason),
        overlap=OverlapResult(overlap.eff_trace, overlap.eff_saved),
        tp_prefill=job.tp_prefill,
        tp_decode=job.tp_decode,
        codec=job.codec,
        transport=job.transport,
        files=[str(f) for f in files],
    )


if __name__ == "__main__":
    sys.exit(main())
