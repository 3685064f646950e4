"""Checks of what callers hand to a channel, made before anything is sent."""

from __future__ import annotations

from sagellm.core.protocols import ConfigError, KVBlock, TransferKey, UnsupportedOperationError

__all__ = ["MAX_ID_CHARACTERS", "check_deadline", "checked_key", "is_block", "is_tensor", "wrap"]

MAX_ID_CHARACTERS = 512
"""Longest id of a transfer."""


def check_deadline(deadline_s: float) -> None:
    if not 0 < deadline_s < 1e9:
        raise ConfigError(f"a deadline of {deadline_s} s makes no sense")


def checked_key(key: TransferKey) -> TransferKey:
    if (
        not isinstance(key, tuple)
        or len(key) != 2
        or not isinstance(key[0], str)
        or not isinstance(key[1], int)
        or not 0 < len(key[0]) <= MAX_ID_CHARACTERS
        or not 0 <= key[1] < 1 << 63
        or not (key[0].isascii() or _is_text(key[0]))
    ):
        raise ConfigError(
            f"{key!r} is no TransferKey(id, attempt) with an id of 1..512 characters "
            "and an attempt from 0"
        )
    return key if type(key) is TransferKey else TransferKey(*key)


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def is_tensor(value: object) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def is_block(value: object) -> bool:
    return isinstance(value, KVBlock) or is_tensor(value)


def wrap(blocks: object) -> list[KVBlock]:
    """Plain tensors as blocks that can be read in place."""
    import torch

    given = [blocks] if isinstance(blocks, torch.Tensor) else list(blocks)  # type: ignore[call-overload]  # a sequence, by the caller's type
    wrapped = []
    for position, item in enumerate(given):
        block = item if isinstance(item, KVBlock) else KVBlock(item, -1, position)
        if not isinstance(block.tensor, torch.Tensor):
            raise ConfigError(f"item {position} is {type(item).__name__}, not a tensor or KVBlock")
        if block.tensor.device.type != "cpu":
            raise UnsupportedOperationError(
                f"item {position} is on {block.tensor.device}: a channel moves host memory"
            )
        tensor = block.tensor.detach()
        wrapped.append(KVBlock(tensor.contiguous(), block.layer, block.index))
    return wrapped
