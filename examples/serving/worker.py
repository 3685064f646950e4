"""What prefill and decode ranks have in common: groups, the model's shard, the KV channel."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from llama_tp import LlamaTP
from paged_kv import HeadMove, plan_head_moves

from sagellm.comm.collective_ops import create_comm_backend
from sagellm.comm.kv_transfer import KVTransferChannel, KVTransferSettings
from sagellm.core.protocols import CommBackendProtocol, ConfigError, DistributedRuntimeError
from serving.messages import Command, Job, Ready, Span

if TYPE_CHECKING:
    from serving.rank import Parent


class Worker(ABC):
    """One rank: its tensor-parallel group, its shard, its KV blocks and its channel.

    Attributes:
        spans: What it did, for the timeline.

    """

    def __init__(self, job: Job, rank: int, parent: Parent, num_blocks: int) -> None:
        torch.set_num_threads(job.threads)
        self.job = job
        self.rank = rank
        self.parent = parent
        self.spans: list[Span] = []
        # tensors live on the CPU here, so `auto` is asked for the CPU's best
        self.world = create_comm_backend(job.backend, device="cpu", timeout_s=job.deadline_s)
        if self.world.size != job.world_size:
            raise ConfigError(
                f"backend {job.backend!r} gives a world of {self.world.size} to one of "
                f"{job.world_size} processes: it does not join processes; use auto or gloo"
            )
        prefill = self.world.split(job.prefill_ranks, "prefill")
        decode = self.world.split(job.decode_ranks, "decode")
        group = prefill if job.role(rank) == "prefill" else decode
        if group is None:
            raise DistributedRuntimeError(f"rank {rank} is in neither group of {job}")
        self.group: CommBackendProtocol = group
        self.model = LlamaTP(job.checkpoint, comm_backend=self.group)
        self.cache = self.model.new_cache(num_blocks, job.page_tokens)
        # node id, peers and key come from the default group
        self.channel = KVTransferChannel(
            settings=KVTransferSettings(codec=job.codec, transport=job.transport)
        )
        self.channel.register(self.cache.layout(self.model.fingerprint), self.cache.tensors())

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self.model.config.num_layers

    def moves(self) -> list[HeadMove]:
        """Who sends which heads to whom, in ranks of the two groups."""
        heads = self.model.config.num_kv_heads
        return plan_head_moves(heads, self.job.tp_prefill, self.job.tp_decode)

    def ready(self) -> Ready:
        """What the parent prints about this rank."""
        held = self.model.parameter_bytes()
        # one prompt row per token: what a decode step reduces
        nbytes = self.model.config.hidden_size * self.model.dtype.itemsize
        choice = self.group.explain("all_reduce", nbytes)
        return Ready(
            pid=os.getpid(),
            kv_heads=list(self.cache.kv_heads),
            parameter_bytes=held.local,
            parameter_bytes_total=held.total,
            parameter_bytes_bound=held.bound,
            backend=choice.backend,
            algorithm=choice.algorithm,
            reason=choice.reason,
            paths=self.paths(),
        )

    def do_now(self, command: Command) -> bool:
        """Handle a command beside the computation; False leaves it to `do`."""
        return False

    @abstractmethod
    def meet(self) -> None:
        """Connect to peers before the first request."""

    @abstractmethod
    def paths(self) -> dict[int, str]:
        """How KV goes to each peer."""

    @abstractmethod
    def do(self, command: Command) -> None:
        """Handle a command, in order of arrival."""

    def abandon(self) -> None:
        """Break what peers may wait for, because this process is about to end."""
        self.channel.close()

    def close(self) -> None:
        """Release everything, when no request is in flight."""
        self.channel.close()
        if self.group is not self.world:
            self.group.close()
        self.world.close()
