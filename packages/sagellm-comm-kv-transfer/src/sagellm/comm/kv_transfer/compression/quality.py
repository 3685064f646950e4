"""What a codec does to a model: decoding goes on from a decoded cache, and is compared.

    harness = Harness(model, windows, prefix_tokens=1536)
    print(harness.evaluate(Compressor("quant", step=0.25)))

Needs `transformers` 4.56 or later; the model is any of its causal language models with a plain
KV cache.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from sagellm.core.protocols import ConfigError

from .compressor import Compressor
from .layout import TensorLayout
from .rope import RopeSpec, model_rope

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Coder",
    "Harness",
    "Quality",
    "captured",
    "coder_of",
    "empty_cache",
    "evaluate",
    "outlier_scale",
]

Model: TypeAlias = Any
"""A causal language model of `transformers`, which type checkers need not have."""

Coder: TypeAlias = "Callable[[Tensor, Tensor], tuple[Tensor, Tensor, float]]"
"""Round trip of K and V, [layers, heads, tokens, head_dim]: what comes back, and its bytes."""


@dataclass(frozen=True, slots=True)
class Quality:
    """Means over the windows.

    Attributes:
        ratio: Bytes of the cache over bytes of its frames.
        kl: Kullback-Leibler divergence of the next token's distribution from that with the
            cache as it was, in nats per token.
        top1: Share of tokens whose likeliest successor stays the same.
        perplexity: Relative change of the perplexity; noise on short texts.
        attention_error: Relative error of the attention's output over the prefix.

    """

    ratio: float
    kl: float
    top1: float
    perplexity: float
    attention_error: float


@dataclass(frozen=True, slots=True)
class _Reference:
    ids: Tensor
    k: Tensor
    v: Tensor
    q: list[Tensor]
    logits: Tensor


class Harness:
    """A model with the caches and predictions that codecs are compared with.

    Args:
        model: A causal language model of `transformers`.
        windows: Token ids, [windows, tokens].
        prefix_tokens: Tokens whose cache is coded; those behind them are scored.
        interleaved: The model rotates neighbouring channels (GPT-J, GLM, Cohere); configurations
            do not say so. Whether it rotates at all they do.

    """

    def __init__(
        self, model: Model, windows: Tensor, prefix_tokens: int, *, interleaved: bool = False
    ) -> None:
        import torch

        if not 0 < prefix_tokens < windows.shape[1] - 1:
            raise ConfigError(f"a prefix of {prefix_tokens} of {windows.shape[1]} tokens")
        self.model, self.prefix_tokens = model, prefix_tokens
        self.model.eval()
        config, tokens = model.config.to_dict(), windows.shape[1]
        self.rope = model_rope(config, interleaved=interleaved, tokens=tokens)
        with torch.no_grad():
            self._references = [self._reference(ids) for ids in windows.long()]

    @property
    def shape(self) -> tuple[int, ...]:
        """[layers, heads, tokens, head_dim] of the K that is coded."""
        return tuple(self._references[0].k.shape)

    def caches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """K and V of each window's prefix, in bfloat16."""
        return ((r.k, r.v) for r in self._references)

    def evaluate(self, codec: Compressor | Coder, *, k_scale: Tensor | None = None) -> Quality:
        """How the model goes on from the decoded cache.

        Args:
            codec: A compressor, which is told the model's RoPE; or any round trip.
            k_scale: What K is multiplied by before it is coded and divided by after, as
                `outlier_scale` gives it: the function of the model stays the same.

        """
        import torch

        coder = coder_of(codec, self.rope) if isinstance(codec, Compressor) else codec
        results = []
        with torch.no_grad():
            for r in self._references:
                k = r.k if k_scale is None else (r.k.float() * k_scale).to(r.k.dtype)
                k2, v2, nbytes = coder(k, r.v)
                k2 = k2.float() if k_scale is None else k2.float() / k_scale
                results.append((2 * r.k.nbytes / nbytes, *self._compare(r, k2, v2.float())))
        ratio, kl, top1, loss, error = torch.tensor(results, dtype=torch.float64).mean(0).tolist()
        return Quality(ratio, kl, top1, math.expm1(loss), error)

    def _reference(self, ids: Tensor) -> _Reference:
        import torch

        cache = empty_cache()
        self.model(ids[None, : self.prefix_tokens], past_key_values=cache)
        k = torch.stack([layer.keys[0] for layer in cache.layers]).bfloat16()
        v = torch.stack([layer.values[0] for layer in cache.layers]).bfloat16()
        queries: dict[int, Tensor] = {}
        with captured(self.model, queries):
            logits = self._go_on(ids, k, v)
        return _Reference(ids, k, v, [queries[i] for i in range(len(k))], logits)

    def _go_on(self, ids: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache, dtype = empty_cache(), self.model.dtype
        for i in range(len(k)):
            cache.update(k[i][None].to(dtype, copy=True), v[i][None].to(dtype, copy=True), i)
        out: Tensor = self.model(ids[None, self.prefix_tokens :], past_key_values=cache).logits[0]
        return out.double().log_softmax(-1)

    def _compare(self, r: _Reference, k: Tensor, v: Tensor) -> tuple[float, ...]:
        found = self._go_on(r.ids, k, v)
        kl = (r.logits.exp() * (r.logits - found)).sum(-1).mean()
        top1 = (r.logits.argmax(-1) == found.argmax(-1)).double().mean()
        after = r.ids[self.prefix_tokens + 1 :, None]
        loss = (r.logits[:-1] - found[:-1]).gather(1, after).mean()
        errors = []
        for q, *caches in zip(r.q, r.k.float(), r.v.float(), k, v, strict=True):
            was, now = _attend(q, *caches[:2]), _attend(q, *caches[2:])
            errors.append(float((now - was).norm() / was.norm()))
        return float(kl), float(top1), float(loss), sum(errors) / len(errors)


def evaluate(
    codec: Compressor | Coder,
    model: Model,
    windows: Tensor,
    prefix_tokens: int = 1536,
    *,
    interleaved: bool = False,
) -> Quality:
    """`Harness.evaluate` for one codec."""
    return Harness(model, windows, prefix_tokens, interleaved=interleaved).evaluate(codec)


def coder_of(compressor: Compressor, rope: RopeSpec | None) -> Coder:
    """A compressor's round trip through real frames."""
    layout = TensorLayout(("layer", "kv", "head", "token", "dim"), rope=rope)

    def round_trip(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, float]:
        import torch

        frame = compressor.encode(torch.stack([k, v], 1), layout)
        out = compressor.decode(frame)
        return out[:, 0], out[:, 1], float(len(frame))

    return round_trip


def outlier_scale(layers: int, heads: int, rope: RopeSpec | None, dim: int) -> Tensor:
    """Factors for K's channels that the queries' can take back: [layers, heads, 1, head_dim].

    Per head an eighth of RoPE's pairs is 8 times larger and another eighth 4 times, like the
    outlier channels of many models; without RoPE the same of its channels.
    """
    import torch

    random = torch.Generator().manual_seed(0)
    count = dim if rope is None else rope.dim // 2
    scale = torch.ones(layers, heads, count)
    for row in scale.view(-1, count):
        chosen = torch.randperm(count, generator=random)
        row[chosen[: count // 8]] = 8
        row[chosen[count // 8 : count // 4]] = 4
    if rope is None:
        return scale[:, :, None]
    both = scale.repeat_interleave(2, -1) if rope.interleaved else scale.repeat(1, 1, 2)
    rest = torch.ones(layers, heads, dim - rope.dim)
    return torch.cat([both, rest], -1)[:, :, None]


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention's output for [heads, tokens, dim] queries over the whole prefix."""
    group = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


def empty_cache() -> Any:  # noqa: ANN401  # transformers' own
    """A cache as models of `transformers` fill it."""
    return importlib.import_module("transformers").DynamicCache()


@contextlib.contextmanager
def captured(model: Model, queries: dict[int, Tensor]) -> Iterator[None]:
    """Keep the queries, after RoPE, that each layer's attention is called with."""
    functions = importlib.import_module("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
    before = model.config._attn_implementation
    inner = functions["sdpa"]

    def keep(module: Any, query: Tensor, *args: Any, **fields: Any) -> Any:  # noqa: ANN401  # HF's own
        queries[module.layer_idx] = query[0].float()
        return inner(module, query, *args, **fields)

    model.config._attn_implementation = "sdpa"
    functions["sdpa"] = keep
    try:
        yield
    finally:
        functions["sdpa"] = inner
        model.config._attn_implementation = before
