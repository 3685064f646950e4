"""Micro-batches in turn: one computes while another's communication is under way.

This is the static interleaving that serving engines use: no threads, the same order on all
ranks. A work that was long done when its batch went on is not counted as running until then: its
future says when it ended, or else each step of another batch looks whether it has.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

from sagellm.core.protocols import CommTimeoutError, Interval

from ._values import Foreign
from .completion import StillRunning, is_handle, note_end, resolve

__all__ = ["BatchRun", "token_count"]


def token_count(generators: Sequence[Iterable[Any]]) -> int | None:  # yields are handles
    """The sum of the generators' `num_tokens`; None where not all have one."""
    counts = [getattr(generator, "num_tokens", None) for generator in generators]
    known = [int(count) for count in counts if count is not None]
    return sum(known) if known and len(known) == len(counts) else None


class _Batch:
    def __init__(self, index: int, steps: Iterable[Any]) -> None:  # as above
        self.index = index
        self.steps: Iterator[Any] = iter(steps)
        self.handle: Foreign = None  # what it waits for: Work or future
        self.value: Foreign = None  # what it returned
        self.step = 0
        self.issued = 0.0
        self.ended: list[float] = []

    def look(self) -> None:
        """Note the end of a work that is over and told nobody."""
        done = getattr(self.handle, "done", None)
        if not self.ended and callable(done) and done():
            self.ended.append(time.perf_counter())


class BatchRun:
    """One interleaving of micro-batches on the calling thread.

    Args:
        generators: One per micro-batch; each yields the handle to wait for before it goes on,
            and is sent its result.
        timeout_s: Deadline of each handle.
        serial: Finish one batch before the next begins.

    """

    def __init__(
        self, generators: Sequence[Iterable[Any]], *, timeout_s: float, serial: bool
    ) -> None:
        self._batches = [_Batch(index, steps) for index, steps in enumerate(generators)]
        self._timeout_s = timeout_s
        self._serial = serial
        self._spans: list[tuple[str, str, float, float]] = []
        self._begun = 0.0
        self.origin_s = time.time()

    def run(self) -> list[Any]:
        """Run all batches, and return what each generator returned.

        After an error the other generators are closed.

        Raises:
            CommTimeoutError: A handle was not done in time; names the batch and its step.
            Exception: What a generator or a handle raised, with a note of the batch.

        """
        self._begun = time.perf_counter()
        waiting = deque(self._batches)
        try:
            while waiting:
                batch = waiting.popleft()
                goes_on = self._advance(batch)
                for other in waiting:
                    other.look()
                if goes_on:
                    if self._serial:
                        waiting.appendleft(batch)
                    else:
                        waiting.append(batch)
        except BaseException:
            for batch in self._batches:
                if isinstance(batch.steps, Generator):
                    batch.steps.close()
            raise
        return [batch.value for batch in self._batches]

    def intervals(self) -> tuple[Interval, ...]:
        """What ran when."""
        spans = sorted(self._spans, key=lambda span: span[2:])
        return tuple(
            Interval(at, name, lane, start - self._begun, end - self._begun)
            for at, (name, lane, start, end) in enumerate(spans)
        )

    def _advance(self, batch: _Batch) -> bool:
        where = f"micro-batch {batch.index}, step {batch.step}"
        try:
            sent = self._landed(batch, where)
            start = time.perf_counter()
            try:
                if isinstance(batch.steps, Generator):
                    handle = batch.steps.send(sent)
                else:
                    handle = next(batch.steps)
            except StopIteration as stop:
                batch.value = stop.value
                return False
            finally:
                name = f"batch{batch.index}.{batch.step}"
                self._spans.append((name, "compute", start, time.perf_counter()))
        except BaseException as error:
            error.add_note(f"in {where} of overlap_batches")
            raise
        batch.step += 1
        batch.handle, batch.issued = handle, time.perf_counter()
        batch.ended = note_end(handle)
        return True

    def _landed(self, batch: _Batch, where: str) -> Foreign:  # the handle's result
        handle, batch.handle = batch.handle, None
        if not is_handle(handle):
            return handle
        try:
            value = resolve(handle, self._timeout_s)
        except StillRunning as error:
            raise CommTimeoutError(
                f"the communication of {where} was not done in {self._timeout_s:.3g} s"
            ) from error
        end = batch.ended[0] if batch.ended else time.perf_counter()
        name = f"batch{batch.index}.{batch.step - 1}"
        self._spans.append((name, "comm", batch.issued, max(end, batch.issued)))
        return value
