"""A tensor-parallel Llama: `LlamaTP` is one rank's shard of a Hugging Face checkpoint.

Attention heads, feed-forward channels and vocabulary rows are split over the ranks of a group
that is handed in; norms are on every rank. Two all_reduces per layer and one for the
embedding go through the `reduce` strategy (`row_reduce.py`), and one all_gather joins the logits.

Shape letters: T tokens of this call, N tokens with the cached ones, D hidden, H query heads of
this rank, K its KV heads, E head_dim, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from llama_checkpoint import Checkpoint
from llama_config import LlamaConfig, LlamaShard
from paged_kv import KVSequence, PagedKVCache
from row_reduce import RowReduce, TensorParallelGroup, no_reduce, reduce_after
from torch import Tensor

from sagellm.core.protocols import ConfigError

TINY_LLAMA = Path(__file__).parent / "data" / "tiny_llama"
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class ParameterBytes:
    """What a rank holds, and what it may hold: total / tp + norms + embedding."""

    local: int
    total: int
    bound: int


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: Tensor
    qkv: Tensor  # [(H + 2 K) E, D]
    o: Tensor  # [D, H E]
    mlp_norm: Tensor
    gate_up: Tensor  # [2 F, D]
    down: Tensor  # [D, F]


class LlamaTP:
    """One rank's shard of a Llama, read from a checkpoint slice by slice.

    Every rank of the group must build it with the same checkpoint and call `forward` with the
    same tokens; all get the same logits, bit for bit, so each may choose tokens alone. After
    an error in a collective the group is dead, and the sequence holds partial KV: free it.

    Attributes:
        config: The model's hyper-parameters.
        shard: What this rank holds.
        fingerprint: Equal for equal configurations and checkpoints, on every rank of every
            size and in every dtype; taken from samples of each stored tensor.
    """

    def __init__(
        self,
        checkpoint_dir: str | Path = TINY_LLAMA,
        tp_size: int | None = None,
        rank: int | None = None,
        comm_backend: TensorParallelGroup | None = None,
        dtype: torch.dtype = torch.float32,
        *,
        device: torch.device | str = "cpu",
        reduce: RowReduce | None = None,
    ) -> None:
        """Reads this rank's slices.

        Args:
            checkpoint_dir: Folder with `config.json` and safetensors files.
            tp_size: Ranks to split over; None means as many as `comm_backend` has.
            rank: This rank; None means the one of `comm_backend`.
            comm_backend: The group that sums partial results; may be None for tp_size 1.
            dtype: Dtype of parameters and arithmetic, whatever the file stores.
            device: Where the parameters live; the group must reduce tensors from there. Only
                the CPU is tested; others are unverified on hardware.
            reduce: How row-parallel layers sum; None computes all, then all_reduces once.

        Raises:
            ConfigError: The model cannot be split so, or needs what this class does not compute.
            IntegrityError: A tensor is missing, misshapen, or its file is damaged.
        """
        self.config = LlamaConfig.load(checkpoint_dir)
        if dtype not in _DTYPES:
            raise ConfigError(f"dtype {dtype} is none of {', '.join(map(str, _DTYPES))}")
        tp_size, rank = _place(tp_size, rank, comm_backend)
        self.shard = LlamaShard.of(self.config, tp_size, rank)
        self.dtype = dtype
        self.device = torch.device(device)
        self._group = comm_backend
        self._reduce = reduce or (no_reduce if comm_backend is None else reduce_after(comm_backend))
        with Checkpoint(checkpoint_dir) as checkpoint:
            self._load(checkpoint)
            self.bytes_read = checkpoint.bytes_read
            stored = f"{asdict(self.config)} {checkpoint.fingerprint()}"
        self.fingerprint = hashlib.sha256(stored.encode()).hexdigest()

    def new_cache(self, num_blocks: int, page_tokens: int = 16) -> PagedKVCache:
        """Returns an empty KV cache of this rank's heads, in this model's dtype and device."""
        return PagedKVCache(
            num_layers=self.config.num_layers,
            num_blocks=num_blocks,
            num_kv_heads=self.config.num_kv_heads,
            tp_size=self.shard.tp_size,
            rank=self.shard.rank,
            head_dim=self.config.head_dim,
            page_tokens=page_tokens,
            dtype=self.dtype,
            device=self.device,
        )

    def parameter_bytes(self) -> ParameterBytes:
        """Reports what this rank holds against total / tp + norms + embedding."""
        c, width = self.config, self.dtype.itemsize
        tensors = {id(t): t for t in self._tensors()}.values()  # a tied table counts once
        total = c.total_parameters() * width
        replicated = (c.norm_parameters() + c.embedding_parameters()) * width
        return ParameterBytes(
            local=sum(t.nbytes for t in tensors),
            total=total,
            bound=total // self.shard.tp_size + replicated,
        )

    def forward(
        self,
        tokens: Sequence[int] | Tensor,
        sequence: KVSequence,
        on_layer_done: Callable[[int], None] | None = None,
        *,
        before_layer: Callable[[int], None] | None = None,
        all_positions: bool = False,
    ) -> Tensor:
        """Appends tokens to a sequence and returns the logits that follow.

        Args:
            tokens: At least one token id; a prompt, a part of one, or one token to decode.
            sequence: Continued after its `num_tokens`; grows by the tokens.
            on_layer_done: Called with i as soon as layer i's KV of these tokens lies in the
                sequence's blocks, before the rest of the layer is computed, so that sending
                overlaps computing. On a device "lies" means on the current stream: record an event.
            before_layer: Called with i before layer i's cached KV is touched; returns when it
                is there.
            all_positions: Return logits [T, V] of every token instead of the last one's [V].

        Raises:
            ConfigError: No tokens, ids outside the vocabulary, more positions than the model has,
                or a sequence from a cache of another shape; nothing was computed or sent.
            ResourceError: The cache has no room; nothing was computed or sent.
        """
        steps = self.forward_steps(
            tokens, sequence, before_layer=before_layer, all_positions=all_positions
        )
        while True:
            try:
                i = next(steps)
            except StopIteration as end:
                logits: Tensor = end.value
                return logits
            if on_layer_done is not None:
                on_layer_done(i)

    @torch.no_grad()
    def forward_steps(
        self,
        tokens: Sequence[int] | Tensor,
        sequence: KVSequence,
        *,
        before_layer: Callable[[int], None] | None = None,
        all_positions: bool = False,
    ) -> Generator[int, None, Tensor]:
        """Yields i when layer i's KV is in place and returns the logits: `forward` in steps.

        Each step is one task for a scheduler. Arguments and errors are those of `forward`.
        """
        ids_T = self._check(tokens, sequence)
        start, count = sequence.num_tokens, len(ids_T)
        sequence.reserve(start + count)
        cos_TE, sin_TE = self._rotation(start, count)
        x_TD = self._reduce(self._embed, ids_T)
        for i, layer in enumerate(self._layers):
            h_TD = self._norm(x_TD, layer.attention_norm)
            q_HTE, k_KTE, v_KTE = self._project_qkv(layer, h_TD, cos_TE, sin_TE)
            if before_layer is not None:
                before_layer(i)
            sequence.write(i, start, k_KTE, v_KTE)
            yield i
            k_KNE, v_KNE = sequence.read(i, start + count)
            a_TD = self._attend(q_HTE, k_KNE, v_KNE)
            x_TD = x_TD + self._reduce(partial(_output, layer), a_TD)
            h_TD = self._norm(x_TD, layer.mlp_norm)
            x_TD = x_TD + self._reduce(partial(_mlp, layer), h_TD)
        sequence.mark_filled(start + count)
        if not all_positions:
            x_TD = x_TD[-1:]
        logits_TV = self._logits(self._norm(x_TD, self._final_norm))
        return logits_TV if all_positions else logits_TV[0]

    def _check(self, tokens: Sequence[int] | Tensor, sequence: KVSequence) -> Tensor:
        c, cache = self.config, sequence.cache
        ids_T = torch.as_tensor(tokens, dtype=torch.long, device=self.device)
        if ids_T.ndim != 1 or len(ids_T) == 0:
            raise ConfigError(f"tokens have shape {tuple(ids_T.shape)}; one token or more in a row")
        low, high = int(ids_T.min()), int(ids_T.max())
        if low < 0 or high >= c.vocab_size:
            raise ConfigError(f"token ids {low}..{high} are not all in 0..{c.vocab_size - 1}")
        if sequence.num_tokens + len(ids_T) > c.max_positions:
            raise ConfigError(
                f"{sequence.num_tokens} cached + {len(ids_T)} new tokens exceed the model's "
                f"{c.max_positions} positions"
            )
        pages = cache.layers[0]
        found = (len(cache.layers), cache.kv_heads, pages.shape[-1], pages.dtype)
        wanted = (c.num_layers, self.shard.kv_heads, c.head_dim, self.dtype)
        if found != wanted:
            raise ConfigError(
                f"the cache has (layers, KV heads, head_dim, dtype) {found}, this rank needs "
                f"{wanted}: use new_cache()"
            )
        return ids_T

    def _embed(self, ids_T: Tensor) -> Tensor:
        rows = self.shard.vocab
        if len(rows) == self.config.vocab_size:
            return self._embedding[ids_T]
        here_T = (ids_T >= rows.start) & (ids_T < rows.stop)
        x_TD = self._embedding.new_zeros((len(ids_T), self.config.hidden_size))
        x_TD[here_T] = self._embedding[ids_T[here_T] - rows.start]
        return x_TD

    def _norm(self, x_TD: Tensor, weight_D: Tensor) -> Tensor:
        wide_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
        scale_T = torch.rsqrt(wide_TD.square().mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return weight_D * (wide_TD * scale_T).to(x_TD.dtype)

    def _rotation(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        at_T = torch.arange(start, start + count, dtype=torch.float32, device=self.device)
        angle_TE = torch.outer(at_T, self._inverse_frequencies)
        return angle_TE.cos().to(self.dtype), angle_TE.sin().to(self.dtype)

    def _project_qkv(
        self, layer: _Layer, h_TD: Tensor, cos_TE: Tensor, sin_TE: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads, kv = len(self.shard.heads), len(self.shard.kv_heads)
        qkv_TX = F.linear(h_TD, layer.qkv)
        qkv_HTE = qkv_TX.view(len(h_TD), -1, self.config.head_dim).transpose(0, 1)
        # half-split RoPE: element e turns with element e + E/2, queries and keys alike
        a, b = qkv_HTE[: heads + kv].chunk(2, dim=-1)
        turned = torch.cat((a * cos_TE - b * sin_TE, b * cos_TE + a * sin_TE), dim=-1)
        return turned[:heads], turned[heads:], qkv_HTE[heads + kv :]

    def _attend(self, q_HTE: Tensor, k_KNE: Tensor, v_KNE: Tensor) -> Tensor:
        group = q_HTE.shape[0] // k_KNE.shape[0]
        if group > 1:
            k_KNE, v_KNE = (t.repeat_interleave(group, dim=0) for t in (k_KNE, v_KNE))
        count, known = q_HTE.shape[1], k_KNE.shape[1]
        mask_TN = None
        if 1 < count < known:
            at_T = torch.arange(known - count, known, device=self.device)
            mask_TN = torch.arange(known, device=self.device) <= at_T[:, None]
        out_HTE = F.scaled_dot_product_attention(
            q_HTE[None], k_KNE[None], v_KNE[None], mask_TN, is_causal=1 < count == known
        )[0]
        return out_HTE.transpose(0, 1).flatten(1)

    def _logits(self, x_TD: Tensor) -> Tensor:
        local_TV = F.linear(x_TD, self._lm_head)
        if self._group is None or self.shard.tp_size == 1:
            return local_TV
        local_TV = F.pad(local_TV, (0, self.shard.vocab_stride - local_TV.shape[1]))
        parts = self._group.all_gather(local_TV)
        return torch.cat(list(parts), dim=-1)[:, : self.config.vocab_size]

    def _load(self, checkpoint: Checkpoint) -> None:
        c, s = self.config, self.shard
        e, hidden, ffn = c.head_dim, c.hidden_size, c.intermediate_size

        def read(
            name: str, *shape: int, rows: range | None = None, columns: range | None = None
        ) -> Tensor:
            tensor = checkpoint.read(
                f"{name}.weight", shape, rows=rows, columns=columns, dtype=self.dtype
            )
            return tensor.to(self.device)

        def times_head_dim(heads: range) -> range:
            return range(heads.start * e, heads.stop * e)

        q_rows, kv_rows = times_head_dim(s.heads), times_head_dim(s.kv_heads)
        self._embedding = read("model.embed_tokens", c.vocab_size, hidden, rows=s.vocab)
        self._lm_head = self._embedding
        if not c.tied_embeddings:
            self._lm_head = read("lm_head", c.vocab_size, hidden, rows=s.vocab)
        self._final_norm = read("model.norm", hidden)
        self._layers = []
        for i in range(c.num_layers):
            at, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
            q = read(f"{at}.q_proj", c.num_heads * e, hidden, rows=q_rows)
            k = read(f"{at}.k_proj", c.num_kv_heads * e, hidden, rows=kv_rows)
            v = read(f"{at}.v_proj", c.num_kv_heads * e, hidden, rows=kv_rows)
            gate = read(f"{mlp}.gate_proj", ffn, hidden, rows=s.ffn)
            up = read(f"{mlp}.up_proj", ffn, hidden, rows=s.ffn)
            self._layers.append(
                _Layer(
                    attention_norm=read(f"model.layers.{i}.input_layernorm", hidden),
                    qkv=torch.cat((q, k, v)),
                    o=read(f"{at}.o_proj", hidden, c.num_heads * e, columns=q_rows),
                    mlp_norm=read(f"model.layers.{i}.post_attention_layernorm", hidden),
                    gate_up=torch.cat((gate, up)),
                    down=read(f"{mlp}.down_proj", hidden, ffn, columns=s.ffn),
                )
            )
        pairs_E = torch.arange(0, e, 2, dtype=torch.float32) / e
        self._inverse_frequencies = (1.0 / c.rope_theta**pairs_E).to(self.device)

    def _tensors(self) -> list[Tensor]:
        tensors = [self._embedding, self._lm_head, self._final_norm]
        for layer in self._layers:
            tensors += [layer.attention_norm, layer.qkv, layer.o]
            tensors += [layer.mlp_norm, layer.gate_up, layer.down]
        return tensors


def generate_greedy(
    model: LlamaTP,
    prompt: Sequence[int],
    max_new_tokens: int,
    sequence: KVSequence,
    *,
    stop_ids: Sequence[int] | None = None,
) -> list[int]:
    """Returns the most likely continuation, token by token, a stop token included.

    Args:
        model: This rank's shard; all ranks of its group must call this alike.
        prompt: Tokens to begin with; a single one continues a sequence that was filled
            from elsewhere.
        max_new_tokens: Most tokens to return.
        sequence: Where the KV goes; afterwards it holds all but the last token returned.
        stop_ids: Tokens to stop after; None means the model's own, () never stops early.
    """
    stops = set(model.config.eos_token_ids if stop_ids is None else stop_ids)
    made: list[int] = []
    step: Sequence[int] = prompt
    while len(made) < max_new_tokens:
        made.append(int(model.forward(step, sequence).argmax()))
        if made[-1] in stops:
            break
        step = made[-1:]
    return made


def _output(layer: _Layer, a_TD: Tensor) -> Tensor:
    return F.linear(a_TD, layer.o)


def _mlp(layer: _Layer, x_TD: Tensor) -> Tensor:
    gate, up = F.linear(x_TD, layer.gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, layer.down)


def _place(
    tp_size: int | None, rank: int | None, group: TensorParallelGroup | None
) -> tuple[int, int]:
    if group is None:
        tp_size = 1 if tp_size is None else tp_size
        if tp_size > 1:
            raise ConfigError(
                f"tp_size={tp_size} needs a group of {tp_size} ranks to sum partial results: pass "
                'comm_backend=create_comm_backend("auto") from sagellm.comm.collective_ops'
            )
        return tp_size, rank or 0
    tp_size = group.size if tp_size is None else tp_size
    rank = group.rank if rank is None else rank
    if (tp_size, rank) != (group.size, group.rank):
        raise ConfigError(
            f"tp_size={tp_size}, rank={rank} but comm_backend is rank {group.rank} of {group.size}"
        )
    return tp_size, rank
