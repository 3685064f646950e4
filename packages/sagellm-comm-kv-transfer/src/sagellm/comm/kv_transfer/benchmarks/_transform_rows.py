"""Rows of `bench_compression` on `transform`, which have a model and a measure of their own.

The ratio at a peer's attention error, the mean over layers of the relative error of attention's
output, interpolated in the logarithm over a sweep of steps. Bases are fitted on calibration text
alone; their size, paid once per peer, is a row of its own and no part of the ratios.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from sagellm.comm.kv_transfer.compression import BASES, Compressor, TensorLayout
from sagellm.comm.kv_transfer.compression.basis import Basis
from sagellm.comm.kv_transfer.compression.basis_source import calibrate
from sagellm.core.protocols import ConfigError
from sagellm.core.protocols.bench import Case, Contenders, Missing, Ratio, Row

from . import _transform_data as data
from ._peers import PEERS

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["cases", "contenders", "ratios"]

FIGURE = "transform: ratio at equal attention error"
SIZE = "transform: MB of the basis, once per peer"
STEPS = (0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
LAYOUT = TensorLayout(("layer", "kv", "token", "head", "dim"))
WAYS = {"per layer": ("KIVI-4 g32", 1, 6.0), "across layers": ("int4 g64", None, 11.0)}
"""Peer, layers of a section and goal of the ratio at the peer's error."""

LEAST_ELSEWHERE = 0.92


def cases(quick: bool) -> list[Case]:
    """What is measured; the other domain is left out of a quick run."""
    texts: tuple[data.Domain, ...] = get_args(data.Domain)
    texts = texts[:1] if quick else texts
    found: list[Case] = [
        {"figure": FIGURE, "subject": data.name(t), "text": t, "other basis": not quick}
        for t in texts
    ]
    return [*found, {"figure": SIZE, "subject": data.name("English"), "text": "English"}]


def contenders(case: Case) -> Contenders:
    """Calls that return the case's figure."""
    text: data.Domain = case["text"]
    calls: dict[str, Callable[[], float]] = {}
    if case["figure"] == SIZE:
        calls = {way: functools.partial(_megabytes, way) for way in WAYS}
    else:
        for way, (peer, _, _) in WAYS.items():
            calls[peer] = functools.partial(_peer_ratio, peer, text)
            for basis in get_args(data.Domain):
                if basis == text or case["other basis"]:
                    call = functools.partial(_ratio, way, basis, text)
                    calls[_name(way, basis)] = call
    domains = get_args(data.Domain) if case.get("other basis") else (text,)
    try:
        data.evaluation(text)
        for domain in domains:
            if any((path := _kept(way, domain)) is None or not path.exists() for way in WAYS):
                data.calibration(domain)
    except (ConfigError, ImportError) as e:
        return dict.fromkeys(calls, Missing(str(e)))
    return calls


def ratios(rows: Sequence[Row]) -> list[Ratio]:
    """The promised figures, of rows of these cases; none of others."""
    ours = {(r.case["text"], r.contender): r for r in rows if r.case["figure"] == FIGURE}
    result = []
    for (text, name), row in ours.items():
        found = next((w for w in WAYS if name == _name(w, text)), None)
        if name in PEERS:
            words = f"ratio of {name} itself, {text}"
            result.append(Ratio(words, row.case, row.median, None))
        if found is None:
            continue
        peer, _, goal = WAYS[found]
        words = f"ratio of transform {found} at the attention error of {peer}, {text}"
        result.append(Ratio(words, row.case, row.median, goal if text == "English" else None))
        for basis in get_args(data.Domain):
            other = ours.get((text, _name(found, basis)))
            if basis == text or other is None:
                continue
            value = other.median / row.median if other.median and row.median else None
            words = f"transform {found} on {text}: basis of {basis} / of {text}"
            result.append(Ratio(words, row.case, value, LEAST_ELSEWHERE))
    return result


def _name(way: str, basis: str) -> str:
    return f"transform {way}, calibrated on {basis}"


@functools.cache
def _basis(way: str, domain: data.Domain) -> Basis:
    import torch

    kept = _kept(way, domain)
    if kept is not None and kept.exists():
        basis = Basis.load(kept)
        BASES.put(basis)
        return basis
    found = data.calibration(domain)
    parts = [torch.split(found[n], data.WINDOW, 1) for n in ("k", "v", "q")]
    windows = ((k, v, q, 0) for k, v, q in zip(*parts, strict=True))
    basis = calibrate(windows, model="all-MiniLM-L6-v2", text=domain, join=WAYS[way][1])
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        basis.save(kept.with_suffix(".part"))
        kept.with_suffix(".part").replace(kept)
    BASES.put(basis)
    return basis


def _kept(way: str, domain: data.Domain) -> Path | None:
    """The file of a basis that an earlier run has fitted."""
    folder = data.bases_folder()
    return folder and folder / f"{way.replace(' ', '_')}_{domain}.safetensors"


def _megabytes(way: str) -> float:
    return len(_basis(way, "English").data) / 1e6


@functools.cache
def _peer(name: str, text: data.Domain) -> tuple[float, float]:
    """Error and ratio of a published scheme."""
    held = data.evaluation(text)
    k, v = (held[n].transpose(1, 2) for n in ("k", "v"))
    k2, v2, nbytes = PEERS[name](k, v)
    return attention_error(held, k2.transpose(1, 2), v2.transpose(1, 2)), 2 * k.nbytes / nbytes


def _peer_ratio(name: str, text: data.Domain) -> float:
    return _peer(name, text)[1]


@functools.cache
def _sweep(way: str, basis: data.Domain, text: data.Domain) -> list[tuple[float, float]]:
    """Errors and ratios of our steps; a frame per window."""
    import torch

    held, fingerprint = data.evaluation(text), _basis(way, basis).fingerprint
    cache = torch.stack([held["k"], held["v"]], 1)
    points = []
    for step in STEPS:
        with Compressor("transform", workers=1, basis=fingerprint, step=step) as compressor:
            frames = [compressor.encode(w, LAYOUT) for w in torch.split(cache, data.WINDOW, 2)]
            out = torch.cat([compressor.decode(f) for f in frames], 2)
        error = attention_error(held, out[:, 0], out[:, 1])
        points.append((error, cache.nbytes / sum(map(len, frames))))
    return points


def _ratio(way: str, basis: data.Domain, text: data.Domain) -> float:
    found = ratio_at(_sweep(way, basis, text), _peer(WAYS[way][0], text)[0])
    if found is None:
        raise ConfigError(f"the peer's error is outside the sweep of {STEPS}; widen it")
    return found


def ratio_at(points: Sequence[tuple[float, float]], error: float) -> float | None:
    """The ratio at an error, of (error, ratio) points; None outside of them."""
    for (e0, r0), (e1, r1) in itertools.pairwise(sorted(points)):
        if e0 <= error <= e1:
            part = math.log(error / e0) / math.log(e1 / e0)
            return math.exp(math.log(r0) + part * math.log(r1 / r0))
    return None


def attention_error(held: dict[str, Tensor], k: Tensor, v: Tensor) -> float:
    """Relative error of attention's output within windows, mean over layers."""
    was = _attend(held["q"], held["k"], held["v"])
    off = (_attend(held["q"], k, v) - was).flatten(1).norm(dim=1)
    return float((off / was.flatten(1).norm(dim=1)).mean())


def _attend(*qkv_LTHD: Tensor) -> Tensor:
    import torch

    shape = (-1, data.WINDOW, *qkv_LTHD[0].shape[2:])
    q, k, v = (x.float().view(len(x), *shape).transpose(2, 3) for x in qkv_LTHD)
    out: Tensor = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return out
