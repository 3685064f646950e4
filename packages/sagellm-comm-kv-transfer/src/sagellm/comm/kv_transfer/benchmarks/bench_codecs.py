"""What each codec costs and gains on blocks that look like a KV cache.

The data are synthetic: per channel a mean and a spread of their own, neighbouring tokens
correlated, rounded to the dtype. Real caches differ, so the sizes here rank codecs and do not
promise a ratio for a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sagellm.comm.kv_transfer.compression import create_codec
from sagellm.comm.kv_transfer.memory import bytes_of
from sagellm.core.protocols.bench import Benchmark, Case, Contenders, Ratio, Row

__all__ = ["main"]

NAMES = ("none", "lz4", "lz4-planes", "zstd", "zstd-planes", "lossless", "lossless-fast")
TOKENS, HEADS, DIM = 16, 8, 128


def blocks(dtype: str, count: int) -> list[memoryview]:
    """Blocks of one layer: [2, heads, tokens, dim]."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(2, HEADS, 1, DIM, generator=generator)
    spread = torch.rand(2, HEADS, 1, DIM, generator=generator)
    steps = torch.randn(2, HEADS, TOKENS * count, DIM, generator=generator)
    walk = 0.7 * steps + 0.3 * steps.roll(1, dims=2)
    cache = (mean + spread * walk).to(getattr(torch, dtype))
    return [bytes_of(b.contiguous()) for b in torch.split(cache, TOKENS, dim=2)]


def cases(quick: bool) -> list[Case]:
    """dtype and direction."""
    count = 32 if quick else 128
    return [
        {"dtype": d, "work": w, "blocks": count}
        for d in ("bfloat16", "float32")
        for w in ("encode", "decode")
    ]


def contenders(case: Case) -> Contenders:
    """Every call works through all blocks and returns nothing: the harness takes the time."""
    data = blocks(case["dtype"], case["blocks"])

    def worker(name: str) -> Callable[[], None]:
        codec, dtype = create_codec(name), case["dtype"]
        frames = [bytes(codec.encode(b, dtype=dtype)) for b in data]
        out = memoryview(bytearray(len(data[0])))

        def encode() -> None:
            for block in data:
                codec.encode(block, dtype=dtype)

        def decode() -> None:
            for frame in frames:
                codec.decode(memoryview(frame), out, dtype=dtype)

        return encode if case["work"] == "encode" else decode

    def copy() -> None:
        out = memoryview(bytearray(len(data[0])))
        for block in data:
            out[:] = block

    return {**{n: worker(n) for n in NAMES}, "memcpy, one thread": copy}


def ratios(rows: Sequence[Row]) -> list[Ratio]:
    """Bytes before over bytes after; and speed over a copy's."""
    result = []
    base = {str(r.case): r.median for r in rows if r.contender == "memcpy, one thread"}
    for row in rows:
        copied = base[str(row.case)]
        if row.contender not in NAMES or row.contender == "none" or not row.median or not copied:
            continue
        result.append(
            Ratio(f"speed of {row.contender} / memcpy", row.case, copied / row.median, None)
        )
        if row.case["work"] == "encode":
            data, codec = blocks(row.case["dtype"], 8), create_codec(row.contender)
            sizes = [min(len(b), len(codec.encode(b, dtype=row.case["dtype"]))) for b in data]
            gain = sum(map(len, data)) / sum(sizes)
            result.append(Ratio(f"compression by {row.contender}", row.case, gain, None))
    return result


main = Benchmark(
    "kv_transfer.codecs",
    contenders,
    cases=cases,
    ratios=ratios,
    distributions=("lz4", "zstandard", "torch"),
).main

if __name__ == "__main__":
    raise SystemExit(main())
