"""`bench_compression --gpu`: fixed-rate kernels against a copy of the same values on the device.

Unverified on hardware: the kernels' bits are tested in triton's interpreter, their speed only here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from sagellm.core.protocols.bench import Benchmark, Case, Contenders, Ratio, Row

__all__ = ["main"]

CODES = ("fp8", "int8", "int4")
COPY = "device copy"
CHANNELS = 1024
GOAL = 0.7


def cases(quick: bool) -> list[Case]:
    """Direction, and what shares a scale."""
    mib = 64 if quick else 256
    return [
        {"work": work, "scales": scales, "dtype": "bfloat16", "MiB": mib}
        for work in ("encode", "decode")
        for scales in ("channel", "token")
    ]


def contenders(case: Case) -> Contenders:
    """Calls that end when the device has done."""
    import torch

    from sagellm.comm.kv_transfer.compression import _triton_fixed
    from sagellm.comm.kv_transfer.compression._triton_fixed import Code
    from sagellm.comm.kv_transfer.compression.fixed import fp8_values

    x = torch.randn((case["MiB"] << 19) // CHANNELS, CHANNELS, device="cuda").bfloat16()
    out = torch.empty_like(x)
    table = torch.from_numpy(fp8_values()).cuda()
    length = None if case["scales"] == "channel" else 128

    def worker(code: Code) -> Callable[[], None]:
        step, low, codes = _triton_fixed.encode(x, code, length)

        def run() -> None:
            if case["work"] == "encode":
                _triton_fixed.encode(x, code, length)
            else:
                _triton_fixed.decode(codes, step, low, table, out, code, length)
            torch.cuda.synchronize()

        return run

    def copy() -> None:
        out.copy_(x)
        torch.cuda.synchronize()

    return {"fp8": worker("fp8"), "int8": worker("int8"), "int4": worker("int4"), COPY: copy}


def ratios(rows: Sequence[Row]) -> list[Ratio]:
    """Bytes of values per second over those of a copy."""
    copied = {str(r.case): r.median for r in rows if r.contender == COPY}
    found = []
    for row in rows:
        base = copied[str(row.case)]
        if row.contender != COPY:
            share = base / row.median if base and row.median else None
            found.append(Ratio(f"throughput of {row.contender} / {COPY}", row.case, share, GOAL))
    return found


_benchmark = Benchmark(
    "kv_transfer.compression_gpu",
    contenders,
    cases=cases,
    ratios=ratios,
    distributions=("torch", "triton"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 1 without a CUDA GPU and triton."""
    import torch

    if not torch.cuda.is_available():
        sys.stderr.write("kv_transfer.compression_gpu: --gpu needs a CUDA GPU; torch finds none\n")
        return 1
    return _benchmark.main(argv)


if __name__ == "__main__":
    raise SystemExit(main())
