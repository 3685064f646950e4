"""A prefill rank: computes prompts, and streams each layer's KV while it computes the next."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from paged_kv import KVSequence
from torch import Tensor

from sagellm.comm.overlap import OverlapManager
from sagellm.core.protocols import (
    ConfigError,
    KVTransferError,
    OverlapMetrics,
    Pairing,
    TransferKey,
)
from serving.messages import (
    Command,
    FirstToken,
    Job,
    LayerSent,
    Measure,
    Measured,
    Prefill,
    Prefilled,
    Span,
)
from serving.worker import Worker

if TYPE_CHECKING:
    from serving.rank import Parent

Steps = Generator[int, None, Tensor]


class PrefillWorker(Worker):
    """Computes on one lane and sends on another."""

    def __init__(self, job: Job, rank: int, parent: Parent) -> None:
        super().__init__(job, rank, parent, job.prefill_blocks)
        # later than any transfer's own deadline, whose error says more
        self.overlap = OverlapManager(device="cpu", timeout_s=2 * job.transfer_deadline_s)
        first = job.tp_prefill
        self.targets = [first + m.target_rank for m in self.moves() if m.source_rank == rank]

    def meet(self) -> None:
        """Shake hands with every decode rank that gets heads from here."""
        for target in self.targets:
            self.channel.connect(target, self.job.deadline_s)

    def paths(self) -> dict[int, str]:
        """How KV goes to each target."""
        return {target: self.channel.path(target) for target in self.targets}

    def do(self, command: Command) -> None:
        """Prefill a request, or measure."""
        if isinstance(command, Prefill):
            self._prefill(command)
        elif isinstance(command, Measure):
            self._measure(command)
        else:
            raise ConfigError(f"rank {self.rank} prefills; it cannot do {command}")

    def close(self) -> None:
        """Release everything."""
        self.overlap.close()
        super().close()

    def _prefill(self, command: Prefill) -> None:
        sequence = self.cache.new_sequence(len(command.tokens))
        sending = _Sending(self, command.id, sequence, len(command.tokens), say=True)

        def say_first(logits_V: Tensor) -> None:
            token = int(logits_V.argmax())
            self.parent.say(FirstToken(command.id, token, time.monotonic()))

        compute = self._compute(command.tokens, sequence, say_first)
        started_s = time.monotonic()
        metrics = self._run(compute, sending.tasks())
        self._note(command.id, started_s, metrics, sending.nbytes)
        sequence.free()
        self.parent.say(
            Prefilled(
                id=command.id,
                kv_bytes=sum(t.metrics.bytes for t in sending.transfers),
                wire_bytes=sum(t.metrics.wire_bytes for t in sending.transfers),
                comm_s=metrics.comm_s,
                eff_trace=metrics.eff_trace,
            )
        )

    def _compute(
        self,
        tokens: Sequence[int],
        sequence: KVSequence,
        finish: Callable[[Tensor], None] = lambda _: None,
    ) -> list[Callable[[], int]]:
        """A task per layer, which ends with its KV in place, and one for the logits."""
        steps: Steps = self.model.forward_steps(tokens, sequence)

        def layer() -> int:
            return next(steps)

        def logits() -> int:
            try:
                next(steps)
            except StopIteration as end:
                finish(end.value)
            return self.num_layers

        return [layer] * self.num_layers + [logits]

    # Any: tasks of the overlap manager take and return what they like
    def _run(
        self, compute: Sequence[Callable[..., Any]], comm: Sequence[Callable[..., Any]]
    ) -> OverlapMetrics:
        pairing: Pairing = "zip" if compute and comm else "none"
        handle = self.overlap.schedule(compute, comm, pairing=pairing)
        handle.wait()
        return handle.metrics

    def _measure(self, command: Measure) -> None:
        # what runs first finds colder caches, so both orders are measured in turn
        if command.overlapped_first:
            both = self._overlapped(command)
            compute_s, comm_s = self._apart(command)
        else:
            compute_s, comm_s = self._apart(command)
            both = self._overlapped(command)
        self.parent.say(Measured(both.makespan_s, compute_s, comm_s, both.eff_trace))

    def _overlapped(self, command: Measure) -> OverlapMetrics:
        sequence = self.cache.new_sequence(len(command.tokens))
        sending = _Sending(self, command.overlapped_id, sequence, len(command.tokens))
        self.group.barrier()
        metrics = self._run(self._compute(command.tokens, sequence), sending.tasks())
        sequence.free()
        return metrics

    def _apart(self, command: Measure) -> tuple[float, float]:
        sequence = self.cache.new_sequence(len(command.tokens))
        self.group.barrier()
        compute = self._run(self._compute(command.tokens, sequence), [])
        sending = _Sending(self, command.alone_id, sequence, len(command.tokens))
        sends = [partial(task, i) for i, task in enumerate(sending.tasks())]
        self.group.barrier()
        comm = self._run([], sends)
        sequence.free()
        return compute.makespan_s, comm.makespan_s

    def _note(self, request: str, started_s: float, metrics: OverlapMetrics, nbytes: int) -> None:
        seen = {"compute": 0, "comm": 0}
        for item in sorted(metrics.intervals, key=lambda i: i.start_s):
            kind = "compute" if item.lane.startswith("compute") else "comm"
            index = seen[kind]
            seen[kind] += 1
            last = "logits" if kind == "compute" else "all landed"
            self.spans.append(
                Span(
                    lane="compute" if kind == "compute" else "kv send",
                    name=f"layer {index}" if index < self.num_layers else last,
                    request=request,
                    start_s=started_s + item.start_s,
                    end_s=started_s + item.end_s,
                    nbytes=nbytes if kind == "comm" and index < self.num_layers else 0,
                )
            )


class _Sending:
    """One request's KV on its way to the decode ranks."""

    def __init__(
        self,
        worker: PrefillWorker,
        request: str,
        sequence: KVSequence,
        num_tokens: int,
        *,
        say: bool = False,
    ) -> None:
        self._worker = worker
        self._request = request
        self._num_tokens = num_tokens
        self._say = say
        key, blocks = TransferKey(request), sequence.block_ids
        self._streams = [
            worker.channel.begin(key, target, blocks, deadline_s=worker.job.transfer_deadline_s)
            for target in worker.targets
        ]
        self.transfers = [stream.transfer for stream in self._streams]
        self.nbytes = len(blocks) * worker.cache.block_bytes

    def tasks(self) -> list[Callable[[int], None]]:
        """A task per layer, and one that waits until everything has landed."""
        return [self._send] * self._worker.num_layers + [self._landed]

    def _send(self, layer: int) -> None:
        for stream in self._streams:
            stream.send_layer(layer)
        if layer == self._worker.num_layers - 1:
            for stream in self._streams:
                stream.seal(self._num_tokens)
        for target, transfer in zip(self._worker.targets, self.transfers, strict=True):
            try:
                transfer.wait_layer(layer)
            except KVTransferError as e:
                raise KVTransferError(
                    f"layer {layer} did not reach rank {target}: {e}", key=e.key, cause=e.cause
                ) from e
        if self._say:
            self._worker.parent.say(LayerSent(self._request, layer))

    def _landed(self, _: int) -> None:
        for transfer in self.transfers:
            transfer.wait(self._worker.job.transfer_deadline_s)
