"""The benchmarks run, on cases small enough for a test."""

import pytest

from sagellm.comm.kv_transfer.benchmarks import bench_codecs, bench_transfer
from sagellm.core.protocols.bench import Row


def test_codecs_are_measured():
    rows = []
    for work in ("encode", "decode"):
        case = {"dtype": "bfloat16", "work": work, "blocks": 2}
        for name, run in bench_codecs.contenders(case).items():
            run()
            rows.append(Row(case, name, (1.0,)))

    found = {(r.name, r.case["work"]): r.value for r in bench_codecs.ratios(rows)}

    assert found["compression by zstd", "encode"] > 1
    assert found["speed of lz4 / memcpy", "decode"] == 1
    assert len(bench_codecs.cases(True)) == 4


@pytest.mark.timeout(120)
def test_every_contender_moves_the_blocks():
    case = {"nbytes": 1 << 20, "block_bytes": 1 << 16}
    rows = []
    with bench_transfer.contenders(case) as named:
        for name, run in named.items():
            rows.append(Row(case, name, (run(),)))

    assert all(row.median > 0 for row in rows)
    assert len(bench_transfer.ratios(rows)) == 6
    assert bench_transfer.cases(True)
