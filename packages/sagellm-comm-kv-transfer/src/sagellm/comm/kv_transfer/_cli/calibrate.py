"""`calibrate`: fit the basis that the codec `transform` needs."""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from sagellm.core.protocols import ConfigError
from sagellm.core.protocols.show import print_json, print_line

if TYPE_CHECKING:
    from torch import Tensor

    from sagellm.comm.kv_transfer.compression import RopeSpec
    from sagellm.comm.kv_transfer.compression.basis_source import Window
    from sagellm.comm.kv_transfer.compression.quality import Model

__all__ = ["add_calibrate", "calibrate"]

FILE_NAME = "kv_basis.safetensors"


def add_calibrate(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    add = parser.add_argument
    add("--model", type=Path, help="folder of a causal language model in Hugging Face's layout")
    add(
        "--text", type=Path, action="append", default=[],
        help="file to calibrate on, of the kind that will be served; may be given several times",
    )  # fmt: skip
    add("--windows", help="token ids in place of text: FILE.safetensors or FILE.npz, or FILE:NAME")
    add(
        "--cache", type=Path,
        help="recorded cache in place of text: .safetensors or .npz with k, v and, if known, q: "
        "[layers, tokens, heads, head_dim], as the model caches them",
    )  # fmt: skip
    add("--output", type=Path, help=f"where to; default {FILE_NAME} in the model's folder")
    add(
        "--join", default="1",
        help="layers that are transformed together: 1 (default) keeps layers apart, 'all' gains "
        "most, and is for caches that move whole",
    )  # fmt: skip
    add("--window-tokens", type=_positive, default=1024, help="tokens of a window, default 1024")
    add("--max-windows", type=_positive, default=64, help="windows at most, default 64")
    add("--interleaved", action="store_true", help="RoPE pairs neighbours (GPT-J, GLM, DeepSeek)")
    add("--fingerprint", help="name of the model, with --cache and without --model")
    add("--config", type=Path, help="config.json with the RoPE of --cache, without --model")


def calibrate(arguments: argparse.Namespace) -> int:
    """Run it; the exit code."""
    from sagellm.comm.kv_transfer.compression import basis_source

    model = _model(arguments.model) if arguments.model else None
    if not model and not (arguments.cache and arguments.fingerprint):
        raise ConfigError("give --model, or --cache with --fingerprint and perhaps --config")
    output: Path = arguments.output or (arguments.model or Path()) / FILE_NAME
    if not output.resolve().parent.is_dir():
        raise ConfigError(f"{output.parent} is no folder")
    windows, text = _source(arguments, model)
    basis = basis_source.calibrate(
        itertools.islice(windows, arguments.max_windows),
        model=arguments.fingerprint or basis_source.model_fingerprint(model),
        text=text,
        rope=_rope(arguments, model),
        join=None if arguments.join == "all" else _positive(arguments.join),
        say=None if arguments.json else _say,
    )
    basis.save(output)
    found = {
        "output": str(output), "fingerprint": basis.fingerprint, "model": basis.info.model,
        "layers": basis.info.layers, "join": basis.info.join, "heads": basis.info.heads,
        "head_dim": basis.info.dim, "tokens": basis.info.tokens, "text": basis.info.text,
        "bytes": len(basis.data), "bound_at_step_1": basis.bound(1.0),
    }  # fmt: skip
    if arguments.json:
        print_json(found)
    else:
        print_line(f"{output}: {basis.info}, {basis.info.join} together")
        print_line(f"  fingerprint  {basis.fingerprint}")
        print_line(f"  model        {basis.info.model}")
        print_line(f"  fitted on    {basis.info.tokens} tokens, text {text}")
        print_line(f"  size         {len(basis.data) / 1e6:.1f} MB, once per peer")
    return 0


def _model(folder: Path) -> Model:
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json; give a folder in Hugging Face's layout")
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise ConfigError(
            "`pip install transformers safetensors` brings the model's code"
        ) from None
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", local_files_only=True
        )
    except (OSError, ValueError) as e:
        raise ConfigError(f"{folder} holds no causal language model: {e}") from None


def _source(arguments: argparse.Namespace, model: Model) -> tuple[Iterator[Window], str]:
    """The windows, and a hash of what they come from."""
    from sagellm.comm.kv_transfer.compression import basis_source

    given = [bool(arguments.text), bool(arguments.windows), bool(arguments.cache)]
    if sum(given) != 1:
        raise ConfigError("give one of --text, --windows and --cache")
    tokens = arguments.window_tokens
    if arguments.cache:
        tensors = basis_source.load_tensors(arguments.cache)
        with arguments.cache.open("rb") as f:
            digest = xxhash.xxh3_128()
            for block in iter(functools.partial(f.read, 1 << 20), b""):
                digest.update(block)
        return basis_source.recorded_windows(tensors, tokens), digest.hexdigest()
    ids = _given_ids(arguments.windows) if arguments.windows else _text_ids(arguments, tokens)
    ids = ids[: arguments.max_windows, :tokens].contiguous().long()
    vocabulary = model.config.vocab_size
    if not ids.numel() or not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise ConfigError(f"token ids {list(ids.shape)} are not of a vocabulary of {vocabulary}")
    return basis_source.model_windows(model, ids), xxhash.xxh3_128_hexdigest(ids.numpy().tobytes())


def _given_ids(text: str) -> Tensor:
    from sagellm.comm.kv_transfer.compression.basis_source import load_tensors

    path, name = (text, "") if Path(text).is_file() else text.rpartition(":")[::2]
    tensors = load_tensors(Path(path))
    if not name and len(tensors) == 1:
        name = next(iter(tensors))
    found = tensors.get(name)
    if found is None or found.dim() != 2 or found.is_floating_point():
        raise ConfigError(
            f"{text} has {sorted(tensors)}; name one of [windows, tokens] as FILE:NAME"
        )
    return found


def _text_ids(arguments: argparse.Namespace, length: int) -> Tensor:
    import torch

    transformers = importlib.import_module("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model, local_files_only=True)
    rows: list[list[int]] = []
    share = -(-arguments.max_windows // len(arguments.text))  # all kinds of text take part
    for path in arguments.text:
        text = path.read_text(encoding="utf-8", errors="replace")
        ids = tokenizer(text[: 32 * length * share], add_special_tokens=False)["input_ids"]
        found = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
        rows += found[:share]
    if not rows:
        raise ConfigError(f"the text has no window of {length} tokens; see --window-tokens")
    return torch.tensor(rows)


def _rope(arguments: argparse.Namespace, model: Model) -> RopeSpec | None:
    from sagellm.comm.kv_transfer.compression.rope import model_rope

    if model is not None:
        config = model.config.to_dict()
    elif arguments.config:
        config = json.loads(arguments.config.read_text(encoding="utf-8"))
    else:
        return None
    return model_rope(config, interleaved=arguments.interleaved, tokens=arguments.window_tokens)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(f"{text} is not positive")
    return number


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
