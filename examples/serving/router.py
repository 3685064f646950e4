"""Sends requests to prefill, hands first tokens to decode, and collects what became of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from sagellm.core.protocols import CollectiveMismatchError, IntegrityError
from serving.messages import (
    Admit,
    Decode,
    Decoded,
    FirstToken,
    LayerSent,
    Measure,
    Measured,
    Prefill,
    Prefilled,
    Ready,
    Span,
    Token,
)
from serving.processes import Fleet
from serving.progress import Progress
from serving.trace import from_first_byte

_WARM_UP = "warm-up"


@dataclass(slots=True)
class Request:
    """One prompt on its way through the job.

    Attributes:
        id: Its name.
        prompt: Token ids.
        sent_s: When prefill was told to begin.
        first_token_s: When the first token was known.
        tokens: What decode made, the first token included.

    """

    id: str
    prompt: list[int]
    sent_s: float = 0.0
    first_token: int = -1
    first_token_s: float = 0.0
    tokens: list[int] = field(default_factory=list)
    prefilled: dict[int, Prefilled] = field(default_factory=dict)
    decoded: dict[int, Decoded] = field(default_factory=dict)

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV that decode received."""
        return sum(p.kv_bytes for p in self.prefilled.values())

    @property
    def wire_bytes(self) -> int:
        """What they took on the wire."""
        return sum(p.wire_bytes for p in self.prefilled.values())

    @property
    def bytes_per_s(self) -> float:
        """KV bytes over the time in which the busiest prefill rank was sending."""
        busy_s = max(p.comm_s for p in self.prefilled.values())
        return self.kv_bytes / busy_s if busy_s else 0.0

    @property
    def time_to_first_token_s(self) -> float:
        """From the moment prefill was told to begin."""
        return self.first_token_s - self.sent_s

    @property
    def tokens_per_s(self) -> float | None:
        """Decoded tokens over the time from the first token to the last; None for one token."""
        made = len(self.tokens) - 1
        elapsed_s = max(d.ended_s for d in self.decoded.values()) - self.first_token_s
        return made / elapsed_s if made else None


@dataclass(frozen=True, slots=True)
class Overlap:
    """What streaming the KV while computing hid; medians over rounds.

    Attributes:
        eff_trace: Share of sending time during which something was computed.
        eff_saved: (compute alone + sending alone - both together) / sending alone.
        compute_s: Prefill without sending.
        comm_s: Sending without prefill.
        overlapped_s: Both together.
        prompt_tokens: Length of the prompt it was measured with.
        rounds: How many rounds were measured.
        eff_saved_quartiles: Lower and upper quartile of the rounds' own `eff_saved`.

    """

    eff_trace: float | None
    eff_saved: float | None
    compute_s: float
    comm_s: float
    overlapped_s: float
    prompt_tokens: int
    rounds: int
    eff_saved_quartiles: tuple[float | None, float | None]


class Router:
    """Drives a job; one request is prefilled at a time while another is decoded."""

    def __init__(self, fleet: Fleet, progress: Progress) -> None:
        self._fleet = fleet
        self._job = fleet.job
        self._progress = progress
        self.ready: dict[int, Ready] = {}

    def wait_until_ready(self, deadline_s: float) -> None:
        """Wait for every rank, and check that the model is truly split.

        Raises:
            IntegrityError: A rank holds more parameters than its share.

        """
        while len(self.ready) < self._job.world_size:
            missing = [r for r in range(self._job.world_size) if r not in self.ready]
            rank, event = self._fleet.next(deadline_s, f"ranks {missing} to start")
            if isinstance(event, Ready):
                self.ready[rank] = event
                self._progress.started(len(self.ready))
                if event.parameter_bytes > event.parameter_bytes_bound:
                    raise IntegrityError(
                        f"rank {rank} holds {event.parameter_bytes} bytes of parameters; its share "
                        f"of {event.parameter_bytes_total} is at most {event.parameter_bytes_bound}"
                    )

    def warm_up(self, prompt: list[int]) -> None:
        """Serve a short prompt that counts for nothing, so that no request pays for first times."""
        self.serve([Request(_WARM_UP, prompt)], 2)

    def serve(self, requests: Sequence[Request], max_new_tokens: int) -> None:
        """Fill in what became of the requests.

        Raises:
            RankLostError: A rank failed.
            CollectiveMismatchError: Ranks of a group disagree about a token.

        """
        by_id = {r.id: r for r in requests}
        waiting = list(requests)
        self._send(waiting, max_new_tokens)
        while not all(self._done(r) for r in requests):
            rank, event = self._fleet.next(self._job.deadline_s * 2, "requests to be served")
            if isinstance(event, LayerSent):
                if rank == 0:
                    self._progress.advanced(event.id)
            elif isinstance(event, FirstToken):
                self._first_token(by_id[event.id], event)
            elif isinstance(event, Prefilled):
                request = by_id[event.id]
                request.prefilled[rank] = event
                if len(request.prefilled) == self._job.tp_prefill:
                    self._send(waiting, max_new_tokens)
            elif isinstance(event, Token):
                if rank == self._job.tp_prefill:
                    self._progress.advanced(event.id)
            elif isinstance(event, Decoded):
                self._decoded(by_id[event.id], rank, event)

    def _done(self, request: Request) -> bool:
        return (
            len(request.prefilled) == self._job.tp_prefill
            and len(request.decoded) == self._job.tp_decode
        )

    def _send(self, waiting: list[Request], max_new_tokens: int) -> None:
        if not waiting:
            return
        request = waiting.pop(0)
        count = len(request.prompt)
        self._fleet.tell(self._job.decode_ranks, Admit(request.id, count, max_new_tokens))
        request.sent_s = time.monotonic()
        self._fleet.tell(self._job.prefill_ranks, Prefill(request.id, request.prompt))

    def _first_token(self, request: Request, event: FirstToken) -> None:
        if request.first_token < 0:
            request.first_token, request.first_token_s = event.token, event.at_s
            self._progress.advanced(request.id)
            self._fleet.tell(self._job.decode_ranks, Decode(request.id, event.token))
        elif request.first_token != event.token:
            raise CollectiveMismatchError(
                f"prefill ranks disagree about the first token of {request.id}: "
                f"{request.first_token} and {event.token}"
            )

    def _decoded(self, request: Request, rank: int, event: Decoded) -> None:
        if request.decoded and request.tokens != event.tokens:
            raise CollectiveMismatchError(f"decode ranks disagree about {request.id}")
        request.decoded[rank] = event
        request.tokens = event.tokens

    def measure_overlap(self, prompt: list[int], rounds: int) -> Overlap:
        """Time a prompt overlapped, without sending, and sending alone, in turn.

        The first round warms up and is left out. A round takes as long as its slowest rank.
        """
        traced: list[float] = []
        slowest: list[tuple[float, float, float]] = []
        for i in range(rounds + 1):
            measured = self._measure_once(prompt, f"measure-{i}")
            if i > 0:
                traced += [m.eff_trace for m in measured if m.eff_trace is not None]
                slowest.append(
                    (
                        max(m.overlapped_s for m in measured),
                        max(m.compute_s for m in measured),
                        max(m.comm_s for m in measured),
                    )
                )
            self._progress.measured(i + 1, rounds + 1)
        both_s, compute_s, comm_s = map(statistics.median, zip(*slowest, strict=True))
        return Overlap(
            eff_trace=statistics.median(traced) if traced else None,
            eff_saved=(compute_s + comm_s - both_s) / comm_s if comm_s else None,
            compute_s=compute_s,
            comm_s=comm_s,
            overlapped_s=both_s,
            prompt_tokens=len(prompt),
            rounds=rounds,
            eff_saved_quartiles=_quartiles([(k + c - b) / comm_s for b, k, c in slowest]),
        )

    def _measure_once(self, prompt: list[int], name: str) -> list[Measured]:
        command = Measure(f"{name}-both", f"{name}-alone", prompt)
        for key in (command.overlapped_id, command.alone_id):
            self._fleet.tell(self._job.decode_ranks, Admit(key, len(prompt), discard=True))
        self._fleet.tell(self._job.prefill_ranks, command)
        measured: list[Measured] = []
        while len(measured) < self._job.tp_prefill:
            _, event = self._fleet.next(self._job.deadline_s * 2, "the measurement of overlap")
            if isinstance(event, Measured):
                measured.append(event)
        return measured

    def stop(self) -> dict[int, list[Span]]:
        """End the ranks and return what each did for the requests."""
        spans = {
            rank: [s for t in timelines for s in t.spans if s.request != _WARM_UP]
            for rank, timelines in self._fleet.stop().items()
        }
        return from_first_byte(spans)


def _quartiles(values: list[float]) -> tuple[float | None, float | None]:
    if len(values) < 2:
        return None, None
    low, _, high = statistics.quantiles(values, n=4)
    return low, high
