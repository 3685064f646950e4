"""Every level of compression against the published ones at equal quality, and its speed.

    python -m sagellm.comm.kv_transfer.benchmarks.bench_compression [--model DIR --text FILE]
    python -m sagellm.comm.kv_transfer.benchmarks.bench_compression --gpu

Quality is that of a language model that goes on from the decoded cache: the prefix of 1 536
tokens is coded, 256 more are scored. The ratio of `quant` at a peer's Kullback-Leibler divergence
is interpolated, in the logarithm, over the sweep of steps of the same run. Sizes are those of
real frames; the peers' are ideal where they have an arithmetic coder.

The last cases move distinct KV through channels over links of several speeds, between two network
namespaces, which needs root; `python -m sagellm.comm.kv_transfer.benchmarks._links` is these alone.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from sagellm.comm.kv_transfer.benchmarks import (
    _gpu_kernels,
    _links,
    _subject,
    _transform_data,
    _transform_rows,
)
from sagellm.comm.kv_transfer.benchmarks._peers import PEERS
from sagellm.comm.kv_transfer.compression import Compressor, TensorLayout
from sagellm.comm.kv_transfer.compression.quality import Coder, Quality, coder_of, outlier_scale
from sagellm.core.protocols import ConfigError
from sagellm.core.protocols.bench import Benchmark, Case, Contenders, Missing, Ratio, Row

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["main"]

STEPS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)
FIGURES = ("ratio", "kl", "top1", "attention_error")
GOALS = {
    "int8 per token and head": 2.6,
    "fp8 e4m3": 4.6,
    "KIVI-4 g32": 5.4,
    "int4 g64": 6.3,
    "TurboQuant-4": 6.5,
    "CacheGen as in LMCache": 7.2,
    "CacheGen as published, b = 0.25": 5.4,
    "KIVI-2 g32": 8.7,
}
BLIND_GOALS = {"fp8 e4m3": 3.4, "KIVI-4 g32": 3.9, "int4 g64": 4.4}
LOSSLESS = ("lossless", "lossless-fast", "zstd")
OUTLIERS = ("quant 0.25", "int4 g64", "CacheGen as in LMCache")
SPEED = ("zstd-1", "quant 0.25", "lossless-fast", "lossless", "ZipNN")


def codecs() -> dict[str, Compressor | Coder]:
    """Everything whose quality is measured."""
    quant = {f"quant {step:g}": Compressor("quant", step=step) for step in STEPS}
    blind = {f"{name}, no RoPE known": coder_of(c, None) for name, c in quant.items()}
    lossless: dict[str, Compressor | Coder] = {name: Compressor(name) for name in LOSSLESS}
    if (zipnn := _zipnn()) is not None:
        lossless["ZipNN"] = functools.partial(_through, zipnn)
    return {**PEERS, **quant, **blind, **lossless}


def _zipnn() -> Any:  # noqa: ANN401  # an optional library without types
    """One thread of ZipNN for bfloat16; None where it is not installed."""
    with warnings.catch_warnings():  # what it imports deprecates itself
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module("zipnn").ZipNN(bytearray_dtype="bfloat16", threads=1)
        except ImportError:
            return None


def _through(zipnn: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, float]:  # noqa: ANN401
    import torch

    both = torch.stack([k, v], 1)
    coded = zipnn.compress(both.view(torch.uint8).numpy().tobytes())
    back = torch.frombuffer(bytearray(zipnn.decompress(coded)), dtype=both.dtype).view(both.shape)
    return back[:, 0], back[:, 1], float(len(coded))


@functools.cache
def quality(name: str, windows: int, outliers: bool = False) -> Quality:
    """Measured once per process: it is the same every time."""
    if outliers:
        harness = _subject.harness(windows)
        layers, heads, _, dim = harness.shape
        scale = outlier_scale(layers, heads, harness.rope, dim)
        return harness.evaluate(codecs()[name], k_scale=scale)
    return _subject.harness(windows).evaluate(codecs()[name])


def cases(quick: bool) -> list[Case]:
    """What is measured, on how many windows."""
    windows = 2 if quick else _subject.WINDOWS
    common = {"subject": _subject.name(), "windows": windows}
    return [
        *({"figure": f, **common} for f in FIGURES),
        {"figure": "kl with outlier channels", **common},
        {"figure": "encode, GB/s of one core", **common},
        {"figure": "decode, GB/s of one core", **common},
        *_links.cases(quick),
        *_transform_rows.cases(quick),
    ]


def contenders(case: Case) -> Contenders | AbstractContextManager[Contenders]:
    """Calls that return the case's figure."""
    if "link" in case:
        return _links.contenders(case)
    if case["figure"].startswith("transform"):
        return _transform_rows.contenders(case)
    figure, windows = case["figure"], case["windows"]
    if "GB/s" in figure:
        way = figure.startswith("encode")
        return {n: _worker(n, way) for n in SPEED}
    if figure == "kl with outlier channels":
        return {n: functools.partial(_figure, n, "kl", windows, True) for n in OUTLIERS}
    return {n: functools.partial(_figure, n, figure, windows, False) for n in codecs()}


def _figure(name: str, figure: str, windows: int, outliers: bool) -> float:
    value: float = getattr(quality(name, windows, outliers), figure)
    return value


@functools.cache
def _cache() -> Tensor:
    """One window's cache as engines have it: [layers, 2, tokens, heads, head_dim].

    A small model's heads of several layers count as heads of one: engines' layers are wider.
    """
    import torch

    k, v = next(iter(_subject.harness(1).caches()))
    x = torch.stack([k, v], 1)  # [layers, 2, heads, tokens, dim]
    layers, _, heads, tokens, dim = x.shape
    join = next(n for n in (8, 4, 2, 1) if layers % n == 0 and n * heads <= max(8, heads))
    x = x.view(-1, join, 2, heads, tokens, dim).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(layers // join, 2, tokens, join * heads, dim).contiguous()


def _worker(name: str, encode: bool) -> Callable[[], float] | Missing:
    import torch

    cache = _cache()
    coder: Callable[[], object]
    if name == "ZipNN":
        if (zipnn := _zipnn()) is None:
            return Missing("`pip install zipnn` brings it")
        raw = cache.view(torch.uint8).numpy().tobytes()
        coded = zipnn.compress(raw)
        coder = (lambda: zipnn.compress(raw)) if encode else (lambda: zipnn.decompress(coded))
    elif name == "zstd-1":
        import zstandard

        parts = cache.flatten(0, 1)
        sections = [s.view(torch.uint8).numpy().reshape(-1).data for s in parts]
        compressor, decompressor = zstandard.ZstdCompressor(1), zstandard.ZstdDecompressor()
        frames = [compressor.compress(s) for s in sections]

        def coder() -> object:
            if encode:
                return [compressor.compress(s) for s in sections]
            return [decompressor.decompress(f) for f in frames]

    else:
        codec, _, step = name.partition(" ")
        worker = (
            Compressor(codec, workers=1, step=float(step)) if step else Compressor(codec, workers=1)
        )
        layout = TensorLayout(
            ("layer", "kv", "token", "head", "dim"), rope=_subject.harness(1).rope
        )
        frame, out = worker.encode(cache, layout), torch.empty_like(cache)

        def coder() -> object:
            return worker.encode(cache, layout) if encode else worker.decode(frame, out)

    def timed() -> float:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            best = math.inf
            for _ in range(5):  # the machine's other work only ever adds, even to CPU time
                started = time.process_time()
                coder()
                best = min(best, time.process_time() - started)
            return cache.nbytes / best / 1e9
        finally:
            torch.set_num_threads(threads)

    return timed


def at_kl(points: Sequence[tuple[float, float]], kl: float) -> float | None:
    """The ratio at a divergence, of (divergence, ratio) points, between the nearest two.

    None when the divergence lies below all; the last ratio when it lies above all.
    """
    ordered = sorted((k, r) for k, r in points if k > 0)
    if not ordered or kl < ordered[0][0]:
        return None
    for (k0, r0), (k1, r1) in itertools.pairwise(ordered):
        if k0 <= kl <= k1:
            part = math.log(kl / k0) / math.log(k1 / k0)
            return math.exp(math.log(r0) + part * math.log(r1 / r0))
    return ordered[-1][1]


def ratios(rows: Sequence[Row]) -> list[Ratio]:
    """The figures that are promised, with their goals."""
    on_links = _links.ratios(rows)
    rows = [r for r in rows if "link" not in r.case]
    case = {k: v for k, v in rows[0].case.items() if k != "figure"}
    found = {(r.case["figure"], r.contender): r.median for r in rows if r.median is not None}

    def sweep(suffix: str) -> list[tuple[float, float]]:
        names = [f"quant {step:g}{suffix}" for step in STEPS]
        return [(found["kl", n], found["ratio", n]) for n in names]

    result = []
    for suffix, goals, words in (
        ("", GOALS, "ratio of quant at the KL of"),
        (", no RoPE known", BLIND_GOALS, "ratio of quant without RoPE parameters at the KL of"),
    ):
        points = sweep(suffix)
        for peer, goal in goals.items():
            result.append(Ratio(f"{words} {peer}", case, at_kl(points, found["kl", peer]), goal))
    result += [Ratio(f"ratio of {peer} itself", case, found["ratio", peer], None) for peer in PEERS]
    result.append(Ratio("ratio of lossless", case, found["ratio", "lossless"], 1.49))
    result.append(Ratio("ratio of lossless-fast", case, found["ratio", "lossless-fast"], 1.48))
    fast = found["ratio", "lossless-fast"]
    for peer in ("zstd", "ZipNN"):
        theirs = found.get(("ratio", peer))
        share = fast / theirs if theirs else None
        result.append(Ratio(f"ratio of lossless-fast / that of {peer}", case, share, None))
    for name in OUTLIERS:
        with_, without = found["kl with outlier channels", name], found["kl", name]
        least = 1 / 1.1 if name.startswith("quant") else None
        words = f"KL of {name} without outlier channels / with them"
        result.append(Ratio(words, case, without / with_, least))
    for ours, peer, floors in (
        ("quant 0.25", "zstd-1", (0.8, 0.8)),
        ("lossless-fast", "ZipNN", (1.0, 0.6)),
    ):
        for way, floor in zip(("encode", "decode"), floors, strict=True):
            figure = f"{way}, GB/s of one core"
            a, b = found.get((figure, ours)), found.get((figure, peer))
            share = a / b if a and b else None
            result.append(Ratio(f"{way} speed of {ours} / {peer}", case, share, floor))
    return [*result, *on_links, *_transform_rows.ratios(rows)]


_benchmark = Benchmark(
    "kv_transfer.compression",
    contenders,
    cases=cases,
    ratios=ratios,
    metric="figure",
    unit="as the case says",
    better="higher",
    repeats=5,
    warmup=1,
    distributions=("torch", "zstandard", "transformers", "zipnn"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model", help="folder of a checkpoint in Hugging Face's layout")
    parser.add_argument("--text", help="file that the windows are cut from")
    parser.add_argument("--gpu", action="store_true", help="speed of the kernels instead")
    parser.add_argument("--qkv", help="recorded q, k, v for the rows of transform")
    parser.add_argument("--bases", help="folder of fitted bases for the same, kept there")
    options, rest = parser.parse_known_args(argv)
    if options.gpu:
        return _gpu_kernels.main(rest)
    try:
        _subject.choose(options.model, options.text)
        _transform_data.choose(options.qkv, options.bases)
        _subject.harness(1)
    except ConfigError as e:
        sys.stderr.write(f"kv_transfer.compression: {e}\n")
        return 1
    return _benchmark.main(rest)


if __name__ == "__main__":
    raise SystemExit(main())
