"""A decode rank: receives KV and one token per request, and makes the others."""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paged_kv import KVSequence

from sagellm.core.protocols import ConfigError, Transfer, TransferKey
from serving.messages import Admit, Command, Decode, Decoded, Job, Span, Token
from serving.worker import Worker

if TYPE_CHECKING:
    from serving.rank import Parent


@dataclass(frozen=True, slots=True)
class _Admitted:
    admit: Admit
    sequence: KVSequence
    transfer: Transfer


class DecodeWorker(Worker):
    """Grants blocks at once, beside its computation, and decodes requests one after another."""

    def __init__(self, job: Job, rank: int, parent: Parent) -> None:
        super().__init__(job, rank, parent, job.decode_blocks)
        if job.sabotage_layer is not None and not 0 <= job.sabotage_layer < self.num_layers:
            raise ConfigError(
                f"sabotage_layer={job.sabotage_layer} is not in 0..{self.num_layers - 1}"
            )
        mine = rank - job.tp_prefill
        self._sources = [m.source_rank for m in self.moves() if m.target_rank == mine]
        self._allocator = threading.Lock()
        self._admitted: dict[str, _Admitted] = {}
        self._landing: queue.SimpleQueue[_Admitted] = queue.SimpleQueue()
        threading.Thread(target=self._watch, daemon=True).start()

    def meet(self) -> None:
        """Nothing: prefill ranks call."""

    def paths(self) -> dict[int, str]:
        """Empty: prefill ranks choose the path."""
        return {}

    def do_now(self, command: Command) -> bool:
        """Admit requests while another is being decoded."""
        if not isinstance(command, Admit):
            return False
        num_tokens = command.num_tokens
        with self._allocator:
            # all of it now, so that the model takes no blocks while this thread may
            sequence = self.cache.new_sequence(num_tokens + command.max_new_tokens)
        blocks = sequence.block_ids[: self.cache.blocks_for(num_tokens)]
        transfer = self.channel.receive(
            TransferKey(command.id),
            blocks,
            source_node=self._sources,
            deadline_s=self.job.transfer_deadline_s,
        )
        admitted = _Admitted(command, sequence, transfer)
        self._admitted[command.id] = admitted
        self._landing.put(admitted)
        return True

    def do(self, command: Command) -> None:
        """Decode an admitted request."""
        if not isinstance(command, Decode):
            raise ConfigError(f"rank {self.rank} decodes; it cannot do {command}")
        admitted = self._admitted.pop(command.id)
        started_s = time.monotonic()
        tokens = self._decode(admitted, command.first_token)
        self.parent.say(Decoded(command.id, tokens, started_s, time.monotonic()))
        with self._allocator:
            admitted.sequence.free()

    def _decode(self, admitted: _Admitted, first_token: int) -> list[int]:
        sequence, transfer = admitted.sequence, admitted.transfer
        sequence.mark_filled(admitted.admit.num_tokens)
        tokens = [first_token]

        def layer_is_here(layer: int) -> None:
            transfer.wait_layer(layer, self.job.transfer_deadline_s)
            if layer == self.job.sabotage_layer:
                for kv_SHPD in sequence.blocks(layer):
                    kv_SHPD.zero_()

        while len(tokens) < admitted.admit.max_new_tokens:
            start_s = time.monotonic()
            first = len(tokens) == 1
            logits_V = self.model.forward(
                tokens[-1:], sequence, before_layer=layer_is_here if first else None
            )
            if first:
                transfer.wait()  # all of it and sealed, before any token leaves
            tokens.append(int(logits_V.argmax()))
            name = f"token {len(tokens)}"
            self._note("compute", name, admitted.admit.id, start_s)
            self.parent.say(Token(admitted.admit.id, len(tokens)))
        transfer.wait()
        return tokens

    def _watch(self) -> None:
        """Notes when layers land, and reports a transfer that fails. Runs on a thread."""
        try:
            while True:
                admitted = self._landing.get()
                request, transfer = admitted.admit.id, admitted.transfer
                start_s = time.monotonic()
                for layer in range(self.num_layers):
                    transfer.wait_layer(layer, self.job.transfer_deadline_s)
                    if not admitted.admit.discard:
                        self._note("kv receive", f"layer {layer}", request, start_s)
                    start_s = time.monotonic()
                transfer.wait()
                if admitted.admit.discard:
                    del self._admitted[request]
                    with self._allocator:
                        admitted.sequence.free()
        except Exception as e:
            self.parent.die(e)

    def _note(self, lane: str, name: str, request: str, start_s: float) -> None:
        self.spans.append(Span(lane, name, request, start_s, time.monotonic()))
