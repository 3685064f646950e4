"""What a basis is calibrated from: a model of `transformers` and text, or a recorded cache.

Every source yields windows (K, V, queries or None, position of the first token), [layers, tokens,
heads, head_dim], RoPE included.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import xxhash

from sagellm.core.protocols import ConfigError

from .basis import Basis, BasisInfo
from .basis_fit import BasisFit
from .codec import dtype_name
from .layout import Geometry, TensorLayout
from .quality import Model, captured, empty_cache
from .rope import RopeSpec
from .rope_check import check_rope

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Window",
    "calibrate",
    "load_tensors",
    "model_fingerprint",
    "model_windows",
    "recorded_windows",
]

Window: TypeAlias = "tuple[Tensor, Tensor, Tensor | None, int]"
_SHAPE_KEYS = (
    "model_type", "num_hidden_layers", "hidden_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size",
)  # fmt: skip
_SAMPLES = 16  # of each weight


def model_fingerprint(model: Model) -> str:
    """Says whether two models are the same: of their shape and of samples of every weight.

    The same whatever dtype the weights were loaded in, as long as bfloat16 can tell them apart.
    """
    import torch

    config = model.config.to_dict()
    digest = xxhash.xxh3_128(repr([(k, config.get(k)) for k in _SHAPE_KEYS]).encode())
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().reshape(-1)
        at = torch.linspace(0, max(len(flat) - 1, 0), min(_SAMPLES, len(flat))).long()
        digest.update(f"{name} {list(weight.shape)}".encode())
        digest.update(flat[at].cpu().bfloat16().view(torch.int16).numpy().tobytes())
    found: str = digest.hexdigest()
    return found


def model_windows(model: Model, ids: Tensor) -> Iterator[Window]:
    """A causal language model's cache of each window of token ids, [windows, tokens].

    Raises:
        ConfigError: The model has no plain KV cache.

    """
    import torch

    model.eval()
    for row in ids.long():
        cache, queries = empty_cache(), dict[int, Any]()
        with torch.no_grad(), captured(model, queries):
            model(row[None].to(model.device), past_key_values=cache)
        try:
            k, v = (
                torch.stack([getattr(layer, n)[0].cpu().transpose(0, 1) for layer in cache.layers])
                for n in ("keys", "values")
            )
        except (AttributeError, TypeError, RuntimeError) as e:
            raise ConfigError(f"{type(model).__name__} has no plain KV cache: {e}") from None
        q = None
        if sorted(queries) == list(range(len(k))):
            q = torch.stack([queries[i].cpu().transpose(0, 1) for i in range(len(k))])
        yield k, v, q, 0


def recorded_windows(tensors: Mapping[str, Tensor], tokens: int) -> Iterator[Window]:
    """Windows of a recorded cache: `k`, `v` and, where there is one, `q`; one sequence.

    Raises:
        ConfigError: A tensor is missing, or has another shape.

    """
    import torch

    if not {"k", "v"} <= set(tensors):
        raise ConfigError(f"a recorded cache has `k` and `v`, this file {sorted(tensors)}")
    k, v, q = tensors["k"], tensors["v"], tensors.get("q")
    for name, x in (("k", k), ("v", v), ("q", k if q is None else q)):
        if x.dim() != 4 or x.shape[:2] != k.shape[:2] or x.shape[3] != k.shape[3]:
            raise ConfigError(
                f"{name} of a recorded cache is {list(x.shape)}; want [layers, tokens, heads, "
                f"head_dim], the same for all"
            )
        if not x.is_floating_point():
            raise ConfigError(f"{name} of a recorded cache is {dtype_name(x.dtype)}, not floats")
    parts = [torch.split(x, tokens, 1) for x in (k, v)]
    queries = [None] * len(parts[0]) if q is None else torch.split(q, tokens, 1)
    for i, (a, b, c) in enumerate(zip(*parts, queries, strict=True)):
        yield a, b, c, i * tokens


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .npz file; nothing in it is executed.

    Raises:
        ConfigError: Another kind of file, or not a readable one.

    """
    import torch

    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        except (ValueError, TypeError, EOFError) as e:
            raise ConfigError(f"{path} is no file of plain arrays: {e}") from None
    if path.suffix != ".safetensors":
        raise ConfigError(f"{path} is neither .safetensors nor .npz")
    try:
        load = importlib.import_module("safetensors.torch").load_file
    except ImportError:
        raise ConfigError("`pip install safetensors` brings the reader of such files") from None
    try:
        found: dict[str, Tensor] = load(path)
    except OSError:
        raise
    except Exception as e:  # its own class, which an optional dependency cannot be asked for
        raise ConfigError(f"{path} is no safetensors file: {e}") from None
    return found


def calibrate(
    windows: Iterator[Window], *, model: str, text: str, rope: RopeSpec | None = None,
    join: int | None = 1, say: Callable[[str], None] | None = None,
) -> Basis:  # fmt: skip
    """A basis fitted on windows.

    Args:
        windows: At least two; a few thousand tokens per thousand channels that are joined, of
            the kinds of text that will be served.
        model: Fingerprint of the model.
        text: Hash of what the windows were made from.
        rope: How the model rotates keys.
        join: Layers that are transformed together; None: all of them.
        say: Is told how far it is.

    Raises:
        ConfigError: Too few windows or values that cannot be fitted, keys that contradict
            `rope`, or more channels together than a basis takes.

    """
    fit = None
    for number, (k, v, q, position) in enumerate(windows):
        if fit is None:
            layers, _, heads, dim = k.shape
            together = layers if join is None else join
            turned = (rope.inv_freq, rope.interleaved) if rope else ((), False)
            dtype = dtype_name(k.dtype)
            info = BasisInfo(model, layers, heads, dim, together, dtype, text, 0, *turned)
            fit = BasisFit(info)
            if rope:
                axes = TensorLayout(("layer", "token", "head", "dim"), "k", rope=rope)
                geometry = Geometry(tuple(k.shape), axes, k.element_size())
                check_rope(geometry, geometry.canonical(k))
        fit.add(k, v, q, position=position)
        if say:
            say(f"window {number + 1}, {fit.tokens} tokens")
    if fit is None:
        raise ConfigError("no calibration windows")
    return fit.finish(text, say)
