"""A paged KV cache for one tensor-parallel rank, laid out so that it can be sent as it fills.

One tensor per layer, `kv_BSHPD`: B blocks, S = 2 sides (key, value), H KV heads of this rank, P
tokens per page, D elements per head. A block of a layer is one contiguous run of bytes, and so is
any run of heads within one side of it: a peer with another tensor-parallel size takes two whole
stretches per block.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from sagellm.core.protocols import CacheGroup, ConfigError, KVLayout, ResourceError, Shard


@dataclass(frozen=True, slots=True)
class HeadMove:
    """KV heads (global indices) that one rank sends to another."""

    source_rank: int
    target_rank: int
    heads: range


def kv_heads_of(num_kv_heads: int, tp_size: int, rank: int) -> range:
    """Gives the KV heads that a rank holds; ranks beyond the heads share them in runs.

    >>> [list(kv_heads_of(2, tp, rank)) for tp, rank in [(1, 0), (2, 1), (4, 1), (4, 2)]]
    [[0, 1], [1], [0], [1]]

    Raises:
        ConfigError: The heads can be neither dealt out nor replicated evenly.
    """
    if not 0 <= rank < tp_size:
        raise ConfigError(f"rank {rank} of tp_size={tp_size}: need 0 <= rank < tp_size")
    if num_kv_heads % tp_size and tp_size % num_kv_heads:
        raise ConfigError(
            f"tp_size={tp_size} is neither a divisor nor a multiple of the {num_kv_heads} KV heads"
        )
    count = max(1, num_kv_heads // tp_size)
    first = rank * num_kv_heads // tp_size
    return range(first, first + count)


def plan_head_moves(num_kv_heads: int, source_tp: int, target_tp: int) -> list[HeadMove]:
    """Lists who sends which heads to whom so that every target rank gets all it holds, once.

    Where several sources hold the same heads, targets are spread over them.

    >>> [(m.source_rank, m.target_rank, list(m.heads)) for m in plan_head_moves(2, 2, 1)]
    [(0, 0, [0]), (1, 0, [1])]
    """
    moves = []
    replicas = max(1, source_tp // num_kv_heads)
    for target in range(target_tp):
        wanted = kv_heads_of(num_kv_heads, target_tp, target)
        for source in range(target % replicas, source_tp, replicas):
            held = kv_heads_of(num_kv_heads, source_tp, source)
            heads = range(max(wanted.start, held.start), min(wanted.stop, held.stop))
            if heads:
                moves.append(HeadMove(source, target, heads))
    return moves


class PagedKVCache:
    """The KV blocks of one rank, and who uses them.

    The tensors in `layers` live as long as the cache and never move, so they can be registered
    with a `KVTransferChannel` once. Not thread-safe, with one exception: blocks of a layer may be
    read or written from elsewhere as long as no `forward` touches the same sequence and layer.

    Attributes:
        layers: Per layer one tensor kv_BSHPD.
        kv_heads: Global indices of the H heads held here.
        page_tokens: Tokens per block.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        num_kv_heads: int,
        head_dim: int,
        tp_size: int = 1,
        rank: int = 0,
        page_tokens: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Allocates the blocks, zeroed.

        Args:
            num_layers: Layers of the model.
            num_blocks: Blocks in each layer.
            num_kv_heads: KV heads of the whole model; this rank's are derived.
            head_dim: Elements per head.
            tp_size: Ranks that the heads are split over.
            rank: Which of them this is.
            page_tokens: Tokens per block.
            dtype: Of keys and values.
            device: Where the blocks live.

        Raises:
            ConfigError: A count is below 1, or the heads do not split over the ranks.
        """
        for name, value in {
            "num_layers": num_layers,
            "num_blocks": num_blocks,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "page_tokens": page_tokens,
        }.items():
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        kv_heads = kv_heads_of(num_kv_heads, tp_size, rank)
        shape = (num_blocks, 2, len(kv_heads), page_tokens, head_dim)
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.kv_heads = kv_heads
        self.page_tokens = page_tokens
        self._shard: Shard | None = None
        if tp_size > 1:
            parts = num_kv_heads // len(kv_heads)
            part = kv_heads.start // len(kv_heads)
            self._shard = Shard("head", part, parts, replicas=tp_size // parts)
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def free_blocks(self) -> int:
        """How many blocks no sequence holds."""
        return len(self._free)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in one layer."""
        return self.layers[0][0].nbytes

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns the layers under the names that `layout` gives them."""
        return {_layer_name(i): kv_BSHPD for i, kv_BSHPD in enumerate(self.layers)}

    def layout(self, model: str = "") -> KVLayout:
        """Describes these blocks to a peer; `model` is the fingerprint of the weights."""
        return KVLayout(
            groups=(
                CacheGroup(
                    name="kv",
                    kind="kv",
                    layers=tuple(self.tensors()),
                    axes=("block", "kv", "head", "token", "dim"),
                    block_shape=tuple(self.layers[0].shape[1:]),
                    dtype=str(self.layers[0].dtype).removeprefix("torch."),
                    page_tokens=self.page_tokens,
                    shard=self._shard,
                ),
            ),
            model=model,
        )

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks that many tokens need."""
        return -(-num_tokens // self.page_tokens)

    def new_sequence(self, num_tokens: int = 0) -> KVSequence:
        """Returns an empty sequence with room for `num_tokens`; it grows when it must.

        Raises:
            ResourceError: Not enough free blocks; nothing was taken.
        """
        sequence = KVSequence(self)
        sequence.reserve(num_tokens)
        return sequence

    def head_view(self, layer: int, block: int, heads: range) -> torch.Tensor:
        """Returns a view [2, len(heads), P, D] of some heads (global indices) of a block.

        Raises:
            ConfigError: This rank does not hold these heads.
        """
        first = heads.start - self.kv_heads.start
        if not heads or first < 0 or heads.stop > self.kv_heads.stop:
            raise ConfigError(f"KV heads {heads} are not within {self.kv_heads} held here")
        return self.layers[layer][block, :, first : first + len(heads)]

    def _take(self, count: int) -> list[int]:
        if count > len(self._free):
            raise ResourceError(
                f"{count} KV blocks of {self.page_tokens} tokens wanted, {len(self._free)} of "
                f"{self.layers[0].shape[0]} free: free a sequence or give the cache more blocks"
            )
        taken = [self._free.pop() for _ in range(count)]
        for kv_BSHPD in self.layers:
            # a page travels whole: its unused tail must not carry another request's tokens
            kv_BSHPD[taken] = 0
        return taken

    def _give_back(self, blocks: Iterable[int]) -> None:
        self._free.extend(sorted(blocks, reverse=True))


class KVSequence:
    """One request's pages in a `PagedKVCache`.

    Attributes:
        cache: Where the blocks lie.
        block_ids: Blocks of this sequence, in the order of its tokens, the same in every layer.
        num_tokens: Tokens whose KV is complete in all layers.
    """

    def __init__(self, cache: PagedKVCache) -> None:
        self.cache = cache
        self.block_ids: list[int] = []
        self.num_tokens = 0

    def reserve(self, num_tokens: int) -> None:
        """Takes blocks until `num_tokens` fit; new blocks are zeroed.

        Raises:
            ResourceError: Not enough free blocks; nothing was taken.
        """
        missing = self.cache.blocks_for(num_tokens) - len(self.block_ids)
        if missing > 0:
            self.block_ids += self.cache._take(missing)

    def blocks(self, layer: int) -> list[torch.Tensor]:
        """Returns views [2, H, P, D] of this sequence's blocks, each contiguous."""
        return [self.cache.layers[layer][block] for block in self.block_ids]

    def write(self, layer: int, start: int, k_HTD: torch.Tensor, v_HTD: torch.Tensor) -> None:
        """Stores keys and values of T tokens from position `start` on; they must be reserved."""
        kv_BSHPD = self.cache.layers[layer]
        page, end = self.cache.page_tokens, start + k_HTD.shape[1]
        position = start
        while position < end:
            block, offset = self.block_ids[position // page], position % page
            count = min(page - offset, end - position)
            taken = slice(position - start, position - start + count)
            kv_BSHPD[block, 0, :, offset : offset + count] = k_HTD[:, taken]
            kv_BSHPD[block, 1, :, offset : offset + count] = v_HTD[:, taken]
            position += count

    def read(self, layer: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns copies of the first `num_tokens` keys and values, each [H, num_tokens, D]."""
        used = self.block_ids[: self.cache.blocks_for(num_tokens)]
        kv_SHBPD = self.cache.layers[layer][used].permute(1, 2, 0, 3, 4)
        kv_SHTD = kv_SHBPD.flatten(2, 3)[:, :, :num_tokens]
        return kv_SHTD[0], kv_SHTD[1]

    def mark_filled(self, num_tokens: int) -> None:
        """Declares that KV of the first `num_tokens` has been put into the blocks from outside.

        Raises:
            ConfigError: More tokens than reserved blocks can hold.
        """
        room = len(self.block_ids) * self.cache.page_tokens
        if not 0 <= num_tokens <= room:
            raise ConfigError(f"{num_tokens} tokens do not fit {room} reserved; reserve() first")
        self.num_tokens = num_tokens

    def free(self) -> None:
        """Gives the blocks back; call it only when no transfer reads or writes them any more."""
        self.cache._give_back(self.block_ids)
        self.block_ids = []
        self.num_tokens = 0


def _layer_name(index: int) -> str:
    return f"layer{index}"
