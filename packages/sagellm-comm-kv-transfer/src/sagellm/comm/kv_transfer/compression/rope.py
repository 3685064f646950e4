"""Rotary position embeddings: undone on keys before they are quantised, redone after."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sagellm.core.protocols import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RopeSpec", "model_rope", "pairs_of", "rotate"]

_CACHE_BYTES = 16 << 20
_MAX_PAIRS = 1024


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """How a model rotates its keys; a rotation is all that codecs need to undo.

    Attributes:
        inv_freq: Radians per position of each pair of channels. Every scaled variant (linear,
            NTK, Llama 3, YaRN, LongRoPE) is a choice of these.
        interleaved: Pairs are channels (0, 1), (2, 3), …; else the two halves are paired.
            Channels behind the pairs are not rotated.

    """

    inv_freq: tuple[float, ...]
    interleaved: bool = False

    def __post_init__(self) -> None:
        if not 1 <= len(self.inv_freq) <= _MAX_PAIRS:
            raise ConfigError(f"{len(self.inv_freq)} pairs of channels; RoPE has 1..{_MAX_PAIRS}")
        if not all(math.isfinite(f) and abs(f) <= 64.0 for f in self.inv_freq):
            raise ConfigError("a RoPE frequency is not a finite number of radians up to 64")

    @property
    def dim(self) -> int:
        """Channels of a head that are rotated."""
        return 2 * len(self.inv_freq)

    @classmethod
    def of(cls, dim: int, theta: float = 10000.0, *, interleaved: bool = False) -> RopeSpec:
        """Unscaled RoPE.

        >>> RopeSpec.of(4, 100.0).inv_freq
        (1.0, 0.1)
        """
        if dim < 2 or dim % 2 or not theta > 0:
            raise ConfigError(f"RoPE over {dim} channels with theta {theta:g}: want an even number")
        pairs = np.arange(0, dim, 2, dtype=np.float64) / dim
        return cls(tuple((1.0 / theta**pairs).tolist()), interleaved)

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], *, interleaved: bool = False, tokens: int = 0
    ) -> RopeSpec:  # Any: JSON of the model's own configuration
        """RoPE of a Hugging Face `config.json` (or `config.to_dict()`).

        Args:
            config: Keys `rope_theta`, `rope_scaling` or `rope_parameters`, `head_dim`, ….
            interleaved: The engine pairs neighbours (GPT-J, GLM, DeepSeek); configurations do
                not say so.
            tokens: Length of the sequence, for variants that depend on it.

        Raises:
            ConfigError: An unknown variant, or fields that it needs are missing.

        """
        scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        theta = float(scaling.get("rope_theta") or config.get("rope_theta") or 10000.0)
        try:
            head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
            part = scaling.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1
            dim = int(head * part)
            name = str(scaling.get("rope_type") or scaling.get("type") or "default")
            freqs = _scaled(name, dim, theta, scaling, config, tokens)
        except KeyError as e:
            raise ConfigError(f"the model's RoPE configuration lacks {e}") from None
        return cls(tuple(freqs.tolist()), interleaved)


def model_rope(
    config: Mapping[str, Any], *, interleaved: bool = False, tokens: int = 0
) -> RopeSpec | None:  # Any: JSON of the model's own configuration
    """RoPE of a configuration; None where it names none, as for learnt positions."""
    if not any(config.get(k) for k in ("rope_theta", "rope_scaling", "rope_parameters")):
        return None
    return RopeSpec.from_config(config, interleaved=interleaved, tokens=tokens)


Freqs = np.ndarray[Any, np.dtype[np.float64]]  # Any: numpy's own placeholder for the shape


def _scaled(
    name: str, dim: int, theta: float, s: dict[str, Any], config: Mapping[str, Any], tokens: int
) -> Freqs:
    exponent = np.arange(0, dim, 2, dtype=np.float64) / dim
    plain: Freqs = 1.0 / theta**exponent
    longest = config.get("max_position_embeddings", 0)
    trained = int(s.get("original_max_position_embeddings") or longest)
    if name == "default":
        return plain
    if name == "linear":
        return plain / float(s["factor"])
    if name == "dynamic":
        length = max(tokens, trained)
        base = (s["factor"] * length / trained - (s["factor"] - 1)) ** (dim / (dim - 2))
        return np.asarray(1.0 / (theta * base) ** exponent)
    if name == "llama3":
        low, high = trained / s["low_freq_factor"], trained / s["high_freq_factor"]
        wave = 2 * math.pi / plain
        smooth = (trained / wave - s["low_freq_factor"]) / (
            s["high_freq_factor"] - s["low_freq_factor"]
        )
        between = (1 - smooth) * plain / s["factor"] + smooth * plain
        return np.where(wave < high, plain, np.where(wave > low, plain / s["factor"], between))
    if name == "yarn":
        return _yarn(dim, theta, plain, s, trained, float(s.get("factor") or longest / trained))
    if name == "longrope":
        factors = s["long_factor"] if tokens > trained else s["short_factor"]
        return plain / np.asarray(factors, dtype=np.float64)
    raise ConfigError(
        f"RoPE variant {name!r} is unknown; give RopeSpec(inv_freq) the frequencies the model uses"
    )


def _yarn(
    dim: int, theta: float, plain: Freqs, s: dict[str, Any], trained: int, factor: float
) -> Freqs:
    def channel(turns: float) -> float:
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = channel(s.get("beta_fast") or 32), channel(s.get("beta_slow") or 1)
    if s.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    ramp = (np.arange(dim // 2) - first) / max(last - first, 0.001)
    keep = 1 - np.clip(ramp, 0, 1)
    return np.asarray(plain / factor * (1 - keep) + plain * keep)


class _Tables:
    """Cosines and sines of spans of positions, the latest 16 MiB of them. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: OrderedDict[tuple[RopeSpec, int, int], tuple[Tensor, Tensor]] = OrderedDict()
        self._bytes = 0

    def get(self, rope: RopeSpec, position: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Two tensors [tokens, 1, pairs] in float32."""
        import torch

        key = (rope, position, tokens)
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        at = np.arange(position, position + tokens, dtype=np.float64)
        angles = np.outer(at, np.asarray(rope.inv_freq))
        made = tuple(
            torch.from_numpy(f(angles).astype(np.float32)).unsqueeze(1) for f in (np.cos, np.sin)
        )
        cos, sin = made
        with self._lock:
            if key not in self._held:
                self._held[key] = (cos, sin)
                self._bytes += 2 * cos.nbytes
            while self._bytes > _CACHE_BYTES and len(self._held) > 1:
                _, (old, _) = self._held.popitem(last=False)
                self._bytes -= 2 * old.nbytes
        return cos, sin


_tables = _Tables()


def rotate(
    x_PTHR: Tensor, out_PTHR: Tensor, scratch_PTHR: Tensor | None, rope: RopeSpec, position: int, *,
    undo: bool,
) -> None:  # fmt: skip
    """Rotate float32 pairs of channels of consecutive tokens.

    Args:
        x_PTHR: First and second channels of the pairs, [2, tokens, heads, pairs].
        out_PTHR: Where to; shares no memory with the others.
        scratch_PTHR: Room for the tables, spread over heads: long rows are what torch is fast on.
            None where heads are stored one behind the other, which is fast without.
        rope: How.
        position: Of the first token.
        undo: Rotate back, which takes a model's keys to what they were before RoPE.

    """
    import torch

    tables = _tables.get(rope, position, x_PTHR.shape[1])
    cos, sin = (t.to(x_PTHR.device) for t in tables)
    if scratch_PTHR is not None:
        cos, sin = (s.copy_(t) for s, t in zip(scratch_PTHR, (cos, sin), strict=True))
    sign = 1.0 if undo else -1.0
    torch.mul(x_PTHR, cos, out=out_PTHR)
    out_PTHR[0].addcmul_(x_PTHR[1], sin, value=sign)
    out_PTHR[1].addcmul_(x_PTHR[0], sin, value=-sign)


def pairs_of(x_THD: Tensor, rope: RopeSpec) -> Tensor:
    """The rotated channels as a view [2, tokens, heads, pairs]."""
    x = x_THD[..., : rope.dim]
    if rope.interleaved:
        return x.view(*x.shape[:2], -1, 2).permute(3, 0, 1, 2)
    return x.view(*x.shape[:2], 2, -1).permute(2, 0, 1, 3)
