"""Coded transfers between two network namespaces, over links of several speeds.

    python -m sagellm.comm.kv_transfer.benchmarks._links [--quick]

Distinct KV of the small Llama, one request per window of 2 048 tokens, all in flight at once.
The clock runs until the receiver has the last; what came is compared after every turn. `auto` has
channels of its own, so that it knows of the link only what its own transfers have shown, and so has
`raw`, so that it is no slower than a channel that never coded.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from sagellm.comm.kv_transfer import CodecRequest, KVTransferChannel, KVTransferSettings
from sagellm.comm.kv_transfer.compression.auto import NEAR, MaxError, quant_within
from sagellm.core.protocols import (
    CacheGroup,
    CommTimeoutError,
    ConfigError,
    DistributedRuntimeError,
    KVLayout,
    TransferKey,
)
from sagellm.core.protocols.bench import (
    Benchmark,
    Case,
    Contenders,
    Missing,
    Ratio,
    Row,
    end_processes,
)
from sagellm.core.protocols.netns import ShapedHosts, enter_namespace, why_not

from . import _distinct

__all__ = ["cases", "contenders", "ratios"]

LINKS: Mapping[str, str | None] = {
    "0.1 Gbit/s": "100mbit",
    "1 Gbit/s": "1gbit",
    "10 Gbit/s": "10gbit",
    "unshaped": None,
}
FIXED: Mapping[str, tuple[str, dict[str, Any]]] = {
    "raw": ("none", {}),
    "lossless-fast": ("lossless-fast", {}),
    "lossless": ("lossless", {}),
    "quant within 1/32": ("quant", dict(quant_within(NEAR).options)),
    "quant 1/4": ("quant", {"step": 0.25}),
}
AUTO = "auto, near"
_PROMISED = ("lossless", "quant within 1/32", "quant 1/4")
_MAY = ("raw", "lossless-fast", "lossless", "quant within 1/32")
_START_S, _TURN_S = 120.0, 300.0
_ERROR = 0.25
_turns = itertools.count()


def cases(quick: bool) -> list[Case]:
    """The links; quick: little data, and the two in the middle."""
    names = ["1 Gbit/s", "unshaped"] if quick else list(LINKS)
    return [{"figure": "bytes per second", "link": n, "windows": 2 if quick else 32} for n in names]


@contextlib.contextmanager
def contenders(case: Case) -> Iterator[Contenders]:
    """Calls that return bytes of values per second."""
    reason = why_not()
    try:
        file = _distinct.make(case["windows"])
    except ConfigError as e:
        reason = reason or str(e)
    if reason is not None:
        yield {name: Missing(reason) for name in (*FIXED, AUTO)}
        return
    rate = LINKS[case["link"]]
    with ShapedHosts(rate or "10gbit") as hosts, contextlib.ExitStack() as stack:
        if rate is None:
            hosts.unshape()
        raw, fixed, auto = (
            stack.enter_context(_Pair(file, case["windows"], hosts)) for _ in range(3)
        )
        named: dict[str, Callable[[], float]] = {
            name: _call(raw if codec == "none" else fixed, codec, options, None)
            for name, (codec, options) in FIXED.items()
        }
        named[AUTO] = _call(auto, "auto", {}, "near")
        for _ in range(2):
            auto.run("auto", {}, "near")  # the speeds of codecs are measured by the first
        yield named
        _seen[case["link"]] = {**fixed.ratios, "auto": auto.why}


_seen: dict[str, dict[str, Any]] = {}


def _call(
    pair: _Pair, codec: str, options: dict[str, Any], error: MaxError | None
) -> Callable[[], float]:
    return lambda: pair.run(codec, options, error)


class _Pair:
    """Two processes with a channel each; a context."""

    def __init__(self, file: Path, windows: int, hosts: ShapedHosts) -> None:
        self.ratios: dict[str, float] = {}
        self.why = ""
        self._bytes = windows * _distinct.WINDOW_BYTES
        self._names = {(c, tuple(o.items())): n for n, (c, o) in FIXED.items()}
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", __name__])
        self._pipes: list[Connection] = []
        self._processes = []
        for i in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(theirs, i, str(file), windows, hosts.addresses[i], hosts.pids[i]),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> _Pair:
        try:
            addresses = [self._answer(i, _START_S) for i in range(2)]
            for i in range(2):
                self._pipes[i].send(addresses[1 - i])
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        end_processes(self._pipes, self._processes)

    def run(self, codec: str, options: dict[str, Any], error: MaxError | None) -> float:
        """Bytes of values per second of one turn."""
        turn = next(_turns)
        exact = codec == "none" or CodecRequest(codec, options, error).lossless
        self._pipes[1].send((turn, exact))
        self._answer(1, _TURN_S)  # its receives stand
        self._pipes[0].send((turn, codec, options, error))
        started, ratio, self.why = self._answer(0, _TURN_S)
        ended = self._answer(1, _TURN_S)
        if (name := self._names.get((codec, tuple(options.items())))) is not None:
            self.ratios[name] = ratio
        return float(self._bytes / (ended - started))

    def _answer(self, side: int, timeout_s: float) -> Any:  # noqa: ANN401 - as it answers
        if not self._pipes[side].poll(timeout_s):
            raise CommTimeoutError(f"side {side} said nothing in {timeout_s} s")
        try:
            value = self._pipes[side].recv()
        except EOFError:
            raise DistributedRuntimeError(f"side {side} has ended") from None
        if isinstance(value, str):
            raise DistributedRuntimeError(f"side {side}: {value}")
        return value


def _serve(pipe: Connection, side: int, file: str, windows: int, host: str, netns: int) -> None:
    """One end, until the pipe closes."""
    import torch

    torch.set_num_threads(1)
    enter_namespace(netns)
    group = CacheGroup(
        "kv", "kv", tuple(f"layer{i}" for i in range(_distinct.LAYERS)),
        ("block", "kv", "token", "head", "dim"),
        (2, _distinct.PAGE, _distinct.HEADS, _distinct.DIM), "bfloat16", _distinct.PAGE,
    )  # fmt: skip
    source = _distinct.mapped(Path(file), windows)
    held = source if side == 0 else [torch.zeros_like(t) for t in source]
    rope = _distinct.rope()
    per = _distinct.TOKENS // _distinct.PAGE
    ids = [list(range(w * per, (w + 1) * per)) for w in range(windows)]
    channel = KVTransferChannel(
        node_id=side, peers={}, key=b"a benchmark's own key", host=host,
        settings=KVTransferSettings(transport="tcp"),
    )  # fmt: skip
    try:
        channel.register(KVLayout((group,)), dict(zip(group.layers, held, strict=True)))
        pipe.send((channel.address,))
        (address,) = pipe.recv()
        channel.add_peer(1 - side, address)
        while True:
            command = pipe.recv()
            if side == 0:
                turn, codec, options, error = command
                request = CodecRequest(codec, options, error, rope)
                started = time.perf_counter()
                sent = [
                    channel.transfer(
                        b, 1, key=TransferKey(f"{turn}-{i}"), codec=request, deadline_s=_TURN_S
                    )
                    for i, b in enumerate(ids)
                ]
                wire = sum(t.wait().metrics.wire_bytes for t in sent)
                raw = sum(t.metrics.bytes for t in sent)
                pipe.send((started, raw / wire, sent[-1].explain()))
                continue
            turn, exact = command
            receives = [
                channel.receive(TransferKey(f"{turn}-{i}"), b, deadline_s=_TURN_S)
                for i, b in enumerate(ids)
            ]
            pipe.send((True,))
            for r in receives:
                r.wait()
            ended = time.perf_counter()
            same = _alike(source, held, exact=exact)
            pipe.send(ended if same else f"turn {turn} brought other values")
            for t in held:
                t.zero_()
    except EOFError:
        return
    except Exception as e:
        pipe.send(f"{type(e).__name__}: {e}")
        raise
    finally:
        channel.close()


def _alike(source: Sequence[Any], held: Sequence[Any], *, exact: bool) -> bool:
    """Whether values came: the same bits, or up to what the coarsest codec here may do to them."""
    import torch

    for want, got in zip(source, held, strict=True):
        for a, b in zip(want.chunk(32), got.chunk(32), strict=True):
            if not torch.equal(a, b):
                if exact:
                    return False
                x, y = a.float(), b.float()
                if float((x - y).norm() / x.norm()) > _ERROR:
                    return False
    return True


def ratios(rows: Sequence[Row]) -> list[Ratio]:
    """Speed-ups over raw as shares of the codecs' ratios, and `auto` beside the best fixed."""
    found = []
    for link in LINKS:
        mine = {r.contender: r.median for r in rows if r.case.get("link") == link}
        case = next((r.case for r in rows if r.case.get("link") == link), None)
        if case is None:
            continue
        case = {**case, "auto": _seen.get(link, {}).get("auto", "")}
        raw, auto = mine.get("raw"), mine.get(AUTO)
        for name in _PROMISED if LINKS[link] in ("100mbit", "1gbit") else ():
            got, ratio = mine.get(name), _seen.get(link, {}).get(name)
            share = got / raw / ratio if got and raw and ratio else None
            shown = {**case, "ratio": ratio, "speed-up": got / raw if got and raw else None}
            words = f"speed-up of {name} over raw / its ratio, {link}"
            found.append(Ratio(words, shown, share, 0.85))
        best = max((v for n in _MAY if (v := mine.get(n)) is not None), default=None)
        share = auto / best if auto and best else None
        found.append(Ratio(f"auto / best fixed choice, {link}", case, share, 0.95))
        share = auto / raw if auto and raw else None
        found.append(Ratio(f"auto / raw, {link}", case, share, 0.97))
    return found


main = Benchmark(
    "kv_transfer.coded_links",
    contenders,
    cases=cases,
    ratios=ratios,
    metric="throughput",
    unit="bytes_per_s",
    better="higher",
    repeats=5,
    warmup=1,
    distributions=("torch", "zstandard", "transformers"),
    launch_timeout_s=3600.0,
).main

if __name__ == "__main__":
    raise SystemExit(main())
