"""The model and the text that codecs are measured on: the small Llama, or one the user names."""

from __future__ import annotations

import functools
import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from sagellm.comm.kv_transfer.compression.quality import Harness
from sagellm.core.protocols import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["choose", "harness", "name"]

_MODEL, _TEXT = "SAGELLM_BENCH_MODEL", "SAGELLM_BENCH_TEXT"  # from a benchmark to its launches
PREFIX, SCORED, WINDOWS = 1536, 256, 6


def choose(model: str | None, text: str | None) -> None:
    """Measure another checkpoint from here on, in this process and its children."""
    if model and not (Path(model) / "config.json").is_file():
        raise ConfigError(f"{model} has no config.json; give a folder in Hugging Face's layout")
    if model and not text:
        raise ConfigError("a model of yours needs --text, a file of some thousand words")
    if model and text:
        os.environ[_MODEL], os.environ[_TEXT] = model, text


def folder() -> Path | None:
    """Where the model is; None where there is none."""
    if _MODEL in os.environ:
        return Path(os.environ[_MODEL])
    return llama_folder()


def llama_folder() -> Path | None:
    """Where the small Llama and its windows are; None where they are not."""
    for parent in Path(__file__).resolve().parents:
        found = parent / "examples" / "data" / "tiny_llama"
        if (found / "windows.safetensors").is_file():
            return found
    return None


def name() -> str:
    """The model and the text, for the report."""
    if _MODEL in os.environ:
        return f"{Path(os.environ[_MODEL]).name} on {Path(os.environ[_TEXT]).name}"
    return "small Llama (3.84 M, RoPE) on held-out English prose and Python"


@functools.cache
def harness(windows: int = WINDOWS) -> Harness:
    """The model with its reference caches; `ConfigError` where something is missing."""
    path = folder()
    if path is None:
        raise ConfigError("the small Llama is in a checkout's examples/data; or give --model")
    try:
        import torch

        transformers = importlib.import_module("transformers")
    except ImportError:
        raise ConfigError(
            "`pip install transformers safetensors` brings the model's code"
        ) from None
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return Harness(model, _windows(path)[:windows], PREFIX)


def _windows(path: Path) -> Tensor:
    import torch

    if _TEXT not in os.environ:
        load = importlib.import_module("safetensors.torch").load_file
        ids: Tensor = load(path / "windows.safetensors")["heldout_ids"]
        return ids
    tokenizer = importlib.import_module("transformers").AutoTokenizer.from_pretrained(path)
    tokens = tokenizer(Path(os.environ[_TEXT]).read_text())["input_ids"]
    length = PREFIX + SCORED
    count = len(tokens) // length
    if not count:
        raise ConfigError(f"{len(tokens)} tokens of text; one window has {length}")
    return torch.tensor(tokens[: count * length]).view(count, length)
