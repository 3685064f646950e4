"""The Llama hyper-parameters that `config.json` gives, checked, and one rank's share of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from paged_kv import kv_heads_of

from sagellm.core.protocols import ConfigError

T = TypeVar("T", int, float)


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """What a Llama checkpoint says about itself.

    Only what this example computes exactly is accepted: default RoPE, SiLU, no biases, no
    quantisation. Anything else raises when the file is read, never a wrong logit later.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float
    rope_theta: float
    tied_embeddings: bool
    eos_token_ids: tuple[int, ...]

    @classmethod
    def load(cls, checkpoint_dir: str | Path) -> LlamaConfig:
        """Reads `config.json` (and `generation_config.json`, if there is one) of a checkpoint.

        Raises:
            ConfigError: A file is missing or not JSON, or asks for what `LlamaTP` does not do.
        """
        folder = Path(checkpoint_dir)
        path = folder / "config.json"
        if not path.is_file():
            raise ConfigError(f"{path} does not exist: checkpoint_dir must be a checkpoint folder")
        raw = _read_json(path)
        _refuse_unsupported(raw, path)
        hidden = _number(raw, "hidden_size", path)
        heads = _number(raw, "num_attention_heads", path)
        kv_heads = _number(raw, "num_key_value_heads", path, heads)
        if heads % kv_heads:
            raise ConfigError(f"{path}: {heads} query heads are no multiple of {kv_heads} KV heads")
        if raw.get("head_dim") is None and hidden % heads:
            raise ConfigError(
                f"{path}: hidden_size {hidden} is no multiple of {heads} heads: set head_dim"
            )
        head_dim = _number(raw, "head_dim", path, hidden // heads)
        if head_dim % 2:
            raise ConfigError(f"{path}: head_dim {head_dim} is odd; RoPE turns pairs")
        generation = folder / "generation_config.json"
        extra = _read_json(generation) if generation.is_file() else {}
        vocab = _number(raw, "vocab_size", path)
        return cls(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=_number(raw, "intermediate_size", path),
            num_layers=_number(raw, "num_hidden_layers", path),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            max_positions=_number(raw, "max_position_embeddings", path, 2048),
            rms_norm_eps=_number(raw, "rms_norm_eps", path, 1e-6),
            rope_theta=_rope_theta(raw, path),
            tied_embeddings=_flag(raw, "tie_word_embeddings", path),
            eos_token_ids=_token_ids(extra.get("eos_token_id", raw.get("eos_token_id")), path),
        )

    def total_parameters(self) -> int:
        """Counts the elements of every tensor of the model, a tied table once."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        layer = self.hidden_size * (2 * q + 2 * kv + 3 * self.intermediate_size)
        tables = self.embedding_parameters() * (1 if self.tied_embeddings else 2)
        return self.num_layers * layer + tables + self.norm_parameters()

    def embedding_parameters(self) -> int:
        """Counts the elements of the input embedding table."""
        return self.vocab_size * self.hidden_size

    def norm_parameters(self) -> int:
        """Counts the elements of all RMSNorm weights."""
        return (2 * self.num_layers + 1) * self.hidden_size


@dataclass(frozen=True, slots=True)
class LlamaShard:
    """What one tensor-parallel rank holds, as ranges of global indices.

    Vocabulary rows are dealt out `vocab_stride` at a time, so the last ranks may hold fewer.
    """

    rank: int
    tp_size: int
    heads: range
    kv_heads: range
    ffn: range
    vocab: range
    vocab_stride: int

    @classmethod
    def of(cls, config: LlamaConfig, tp_size: int, rank: int) -> LlamaShard:
        """Gives the share of `rank` among `tp_size` ranks.

        Raises:
            ConfigError: The model cannot be split so; the message says which sizes can.
        """
        c = config
        if tp_size < 1 or not 0 <= rank < tp_size:
            raise ConfigError(f"rank {rank} of tp_size={tp_size}: need 0 <= rank < tp_size")
        if c.num_heads % tp_size:
            fits = ", ".join(str(n) for n in _possible_tp(c))
            raise ConfigError(
                f"tp_size={tp_size} does not divide the {c.num_heads} query heads; "
                f"use one of {fits}"
            )
        if c.num_kv_heads % tp_size and tp_size % c.num_kv_heads:
            fits = ", ".join(str(n) for n in _possible_tp(c))
            raise ConfigError(
                f"tp_size={tp_size} is neither a divisor nor a multiple of the {c.num_kv_heads} "
                f"KV heads; use one of {fits}"
            )
        if c.intermediate_size % tp_size:
            raise ConfigError(
                f"tp_size={tp_size} does not divide intermediate_size {c.intermediate_size}"
            )
        stride = -(-c.vocab_size // tp_size)
        return cls(
            rank=rank,
            tp_size=tp_size,
            heads=_slice(c.num_heads // tp_size, rank),
            kv_heads=kv_heads_of(c.num_kv_heads, tp_size, rank),
            ffn=_slice(c.intermediate_size // tp_size, rank),
            vocab=range(min(rank * stride, c.vocab_size), min((rank + 1) * stride, c.vocab_size)),
            vocab_stride=stride,
        )


def _slice(count: int, index: int) -> range:
    return range(index * count, (index + 1) * count)


def _possible_tp(c: LlamaConfig) -> list[int]:
    return [
        n
        for n in range(1, c.num_heads + 1)
        if c.num_heads % n == 0
        and (c.num_kv_heads % n == 0 or n % c.num_kv_heads == 0)
        and c.intermediate_size % n == 0
    ]


# Any below: the values of a JSON object are checked here, one by one.
def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path} is not readable JSON: {e}") from e
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a JSON {type(raw).__name__}, not an object")
    return raw


def _refuse_unsupported(raw: Mapping[str, Any], path: Path) -> None:
    wanted: dict[str, tuple[object, ...]] = {
        "architectures": (["LlamaForCausalLM"],),
        "model_type": ("llama", None),
        "hidden_act": ("silu", "swish", None),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "quantization_config": (None,),
    }
    for key, supported in wanted.items():
        value = raw.get(key)
        if value not in supported:
            raise ConfigError(f"{path}: {key} is {value!r}; LlamaTP supports {supported[0]!r}")


def _rope_theta(raw: Mapping[str, Any], path: Path) -> float:
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):  # the older and the newer spelling
        value = raw.get(key)
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"{path}: {key} is {value!r}, not an object")
        rope.update(value or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ConfigError(f"{path}: rope_type is {kind!r}; LlamaTP supports 'default'")
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ConfigError(f"{path}: partial_rotary_factor is not 1.0; LlamaTP turns whole heads")
    return _number({**raw, **rope}, "rope_theta", path, 10000.0)


def _number(raw: Mapping[str, Any], key: str, path: Path, default: T | None = None) -> T:
    value = raw.get(key)
    if value is None:
        if default is None:
            raise ConfigError(f"{path} has no {key}")
        return default
    kinds = (int, float) if isinstance(default, float) else (int,)
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < float("inf"):
        raise ConfigError(f"{path}: {key} is {value!r}, not a positive number")
    return float(value) if isinstance(default, float) else value


def _flag(raw: Mapping[str, Any], key: str, path: Path) -> bool:
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{path}: {key} is {value!r}, not true or false")
    return bool(value)


def _token_ids(value: object, path: Path) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise ConfigError(f"{path}: eos_token_id is {value!r}, not a token id or a list of them")
    return tuple(ids)
