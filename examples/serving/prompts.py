"""The prompts that the demo brings along, and the model's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from sagellm.core.protocols import ConfigError

PROMPTS = Path(__file__).parent.parent / "data" / "prompts"
_DOCUMENT_START = "<s>"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt in words and tokens.

    Attributes:
        title: What it is, for people.
        text: In words.
        tokens: Its ids, with the one that begins a document.

    """

    title: str
    text: str
    tokens: list[int]


def load_prompts(checkpoint: Path, texts: Sequence[str]) -> tuple[list[Prompt], Tokenizer]:
    """Returns the given prompts, or the demo's own, in the tokens of a checkpoint.

    Raises:
        ConfigError: A prompt is empty, or the checkpoint has no tokenizer.

    """
    path = checkpoint / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: the demo needs the model's tokenizer")
    tokenizer = Tokenizer.from_file(str(path))
    titled = [(f"prompt {i + 1}", text) for i, text in enumerate(texts)]
    if not titled:
        titled = [(p.stem.split("-", 1)[1], p.read_text()) for p in sorted(PROMPTS.glob("*.txt"))]
    start = tokenizer.token_to_id(_DOCUMENT_START)
    prompts = []
    for title, text in titled:
        ids = tokenizer.encode(text).ids
        if not ids:
            raise ConfigError(f"{title} is empty")
        prompts.append(Prompt(title, text, ids if start is None else [start, *ids]))
    return prompts, tokenizer
