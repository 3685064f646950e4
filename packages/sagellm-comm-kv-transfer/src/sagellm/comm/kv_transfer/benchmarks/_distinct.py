"""Real KV, no two stretches of it alike: the small Llama over the standard library's sources."""

from __future__ import annotations

import importlib
import os
import sysconfig
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sagellm.comm.kv_transfer.compression import RopeSpec
from sagellm.comm.kv_transfer.memory import bytes_of
from sagellm.core.protocols import ConfigError

from . import _subject

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DIM", "HEADS", "LAYERS", "PAGE", "TOKENS", "WINDOW_BYTES", "make", "mapped", "rope"]

LAYERS, HEADS, DIM, PAGE, TOKENS = 2, 8, 64, 16, 2048
"""Of a window: a small model's heads of four layers count as heads of one, as engines have."""

WINDOW_BYTES = LAYERS * 2 * TOKENS * HEADS * DIM * 2


def rope() -> RopeSpec:
    """How the model rotates its keys."""
    return _config()[1]


def _config() -> tuple[Path, RopeSpec]:
    path = _subject.folder()
    if path is None:
        raise ConfigError("the small Llama is in a checkout's examples/data")
    try:
        config = importlib.import_module("transformers").AutoConfig.from_pretrained(path)
    except ImportError:
        raise ConfigError(
            "`pip install transformers safetensors` brings the model's code"
        ) from None
    found = RopeSpec.from_config(config.to_dict(), tokens=TOKENS)
    if found is None:
        raise ConfigError(f"{path}: a model without RoPE")
    return path, found


def make(windows: int) -> Path:
    """A file of that many windows, [windows, layers, blocks, 2, page, heads, dim] in bfloat16.

    It stays in the folder for temporary files, for the next launch.

    Raises:
        ConfigError: The model or its code is missing, or the text is too short.

    """
    file = Path(tempfile.gettempdir()) / f"sagellm-bench-kv-{windows}-{os.getuid()}.bin"
    if file.is_file() and file.stat().st_size == windows * WINDOW_BYTES:
        return file
    import torch

    path, _ = _config()
    transformers = importlib.import_module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = _text(transformers.AutoTokenizer.from_pretrained(path), windows * TOKENS)
    part = file.with_suffix(f".{os.getpid()}")
    with part.open("wb") as out, torch.no_grad():
        for window in ids.view(windows, TOKENS):
            out.write(bytes_of(_window(model, window)))
    part.replace(file)
    return file


def _text(tokenizer: Any, count: int) -> Tensor:  # noqa: ANN401 - of a library without types
    import torch

    found: list[int] = []
    for source in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        found += tokenizer(source.read_text(errors="replace"))["input_ids"]
        if len(found) >= count:
            return torch.tensor(found[:count])
    raise ConfigError(f"{len(found)} tokens of text; {count} are needed")


def _window(model: Any, ids: Tensor) -> Tensor:  # noqa: ANN401 - of a library without types
    import torch

    cache = model(ids[None], use_cache=True).past_key_values
    k = torch.stack([layer.keys[0] for layer in cache.layers]).bfloat16()
    v = torch.stack([layer.values[0] for layer in cache.layers]).bfloat16()
    x = torch.stack([k, v], 1)  # [layers, 2, heads, tokens, dim]
    layers, _, heads, tokens, dim = x.shape
    join = layers // LAYERS
    x = x.view(LAYERS, join, 2, heads, tokens // PAGE, PAGE, dim)
    return x.permute(0, 4, 2, 5, 1, 3, 6).reshape(-1).contiguous()


def mapped(file: Path, windows: int) -> list[Tensor]:
    """The layers, each [blocks of all windows, 2, page, heads, dim], copied into memory."""
    import torch

    flat = torch.from_file(str(file), size=windows * WINDOW_BYTES // 2, dtype=torch.bfloat16)
    x = flat.view(windows, LAYERS, TOKENS // PAGE, 2, PAGE, HEADS, DIM)
    return [x[:, i].flatten(0, 1).contiguous() for i in range(LAYERS)]
