"""What the adapter costs over the bare process group, and bandwidth beside the vendor's claim.

    python -m sagellm.comm.domestic.benchmarks.bench_domestic [--quick] [--json F] [--markdown F]

Two ranks. With a domestic accelerator on this host they use it (unverified on hardware); without
one the device is emulated: then `adapter` against `group` is the cost of checks, lowering,
statistics and deadlines in Python, and no figure says anything about a device.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, TYPE_CHECKING

from sagellm.comm.domestic import can_emulate, choose_vendor, create_domestic_backend, emulate
from sagellm.comm.domestic.claims import rate
from sagellm.core.protocols.bandwidth import busbw_factor
from sagellm.core.protocols.bench import Benchmark, Case, Contender, Contenders, Missing, Ratio, Row

if TYPE_CHECKING:
    from torch import Tensor

_RANKS = 2
_CALLS = {4096: 50, 262144: 30, 4194304: 8}
_GOAL_OVER_GROUP = 0.9
_GOAL_OF_CLAIM = 0.8


class _Rank:
    """One rank of the benchmark's world, with both contenders."""

    def __init__(self, vendor: str, emulated: bool) -> None:
        if emulated:
            emulate(vendor)
        self.backend = create_domestic_backend(vendor, timeout_s=60)
        import torch
        import torch.distributed as dist

        self._torch, self._dist = torch, dist
        api = getattr(torch, self.backend.device.type)
        self.device_name = str(api.get_device_name(self.backend.device))

    def run(self, contender: str, op: str, nbytes: int) -> float:
        """Seconds per all_reduce of `nbytes`, over several calls on rotating buffers."""
        torch, dist, backend = self._torch, self._dist, self.backend
        shape, device = (nbytes // 4,), backend.device
        buffers = [torch.ones(shape, device=device) for _ in range(3)]
        group = backend.process_group

        def by_group(x: Tensor) -> None:
            dist.all_reduce(x, group=group)
            if op == "avg":
                x.div_(_RANKS)

        def by_adapter(x: Tensor) -> None:
            backend.all_reduce(x, op)

        call = by_group if contender == "group" else by_adapter
        backend.barrier()
        calls = _CALLS[nbytes]
        started = time.perf_counter()
        for i in range(calls):
            call(buffers[i % len(buffers)])
        getattr(torch, device.type).synchronize()
        return (time.perf_counter() - started) / calls


class _World:
    """Rank 0 in this process and rank 1 in another, for all cases of a launch."""

    def __init__(self) -> None:
        choice = choose_vendor()
        self.emulated = choice.row is None
        self.vendor = choice.row.backend if choice.row is not None else "hccl"
        from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, not in __all__

        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        world = {
            "WORLD_SIZE": str(_RANKS),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        self._peer = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, "--peer", self.vendor, str(int(self.emulated))],
            env={**os.environ, **world, "RANK": "1", "LOCAL_RANK": "1"},
            stdin=subprocess.PIPE,
            text=True,
        )
        os.environ.update(world, RANK="0", LOCAL_RANK="0")
        self.rank = _Rank(self.vendor, self.emulated)

    def run(self, contender: str, op: str, nbytes: int) -> float:
        """Both ranks run; rank 0's seconds per call."""
        assert self._peer.stdin is not None
        self._peer.stdin.write(f"{contender} {op} {nbytes}\n")
        self._peer.stdin.flush()
        return self.rank.run(contender, op, nbytes)

    def close(self) -> None:
        """End the peer and the group."""
        assert self._peer.stdin is not None
        self._peer.stdin.close()
        self.rank.backend.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._peer.wait(20)
        self._peer.kill()


_open: list[_World] = []
_device_names: list[str] = []  # of this launch, for the share of the claim


def _cases(quick: bool) -> Sequence[Case]:
    sizes = list(_CALLS)[:2] if quick else list(_CALLS)
    return [{"op": op, "nbytes": n, "ranks": _RANKS} for n in sizes for op in ("sum", "avg")]


@contextlib.contextmanager
def contenders(case: Case) -> Iterator[Contenders]:
    """The bare group and the adapter, on the same ranks and device."""
    if choose_vendor().row is None and not can_emulate():
        absent = Missing("no domestic accelerator, and this torch cannot emulate one (2.13 can)")
        yield {"group": absent, "adapter": absent}
        return
    if not _open:
        _open.append(_World())
        _device_names.append(_open[0].rank.device_name)
        atexit.register(_open[0].close)
    world = _open[0]

    def contender(name: str) -> Contender:
        return lambda: world.run(name, case["op"], case["nbytes"])

    yield {"group": contender("group"), "adapter": contender("adapter")}


def ratios(rows: Sequence[Row]) -> Iterable[Ratio]:
    """The adapter's speed as a share of the group's, and bus bandwidth as a share of the claim."""
    by_case: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_case.setdefault(str(row.case), {})[row.contender] = row
    for pair in by_case.values():
        ours, bare = pair["adapter"], pair["group"]
        known = ours.median is not None and bare.median is not None
        value = bare.median / ours.median if known else None  # type: ignore[operator]  # known
        yield Ratio("group/adapter", ours.case, value, _GOAL_OVER_GROUP)
    largest = max(
        (p["adapter"] for p in by_case.values() if p["adapter"].case["op"] == "sum"),
        key=lambda row: row.case["nbytes"],
    )
    yield Ratio("busbw/claim", largest.case, _share_of_claim(largest), _GOAL_OF_CLAIM)


def _share_of_claim(row: Row) -> float | None:
    """None for an emulated device, and where no comparable claim is known for the part."""
    choice = choose_vendor()
    if row.median is None or choice.row is None:
        return None
    busbw = row.case["nbytes"] / row.median * busbw_factor("all_reduce", _RANKS)
    name = _device_names[-1] if _device_names else ""
    part = next((c.part for c in choice.row.claims if c.part.lower() in name.lower()), name)
    return rate(choice.row.claims, part, busbw).ratio


def _peer(vendor: str, emulated: bool, orders: IO[str]) -> int:
    rank = _Rank(vendor, emulated)
    for line in orders:
        name, op, nbytes = line.split()
        rank.run(name, op, int(nbytes))
    rank.backend.close()
    return 0


benchmark = Benchmark(
    "domestic",
    contenders,
    cases=_cases,
    ratios=ratios,
    distributions=("sagellm-comm-domestic", "torch"),
    launch_timeout_s=300,
)
main: Callable[..., int] = benchmark.main

if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer"]:
        raise SystemExit(_peer(sys.argv[2], sys.argv[3] == "1", sys.stdin))
    raise SystemExit(main())
