"""A progress bar per request: a step for every layer sent and every token made."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress as Bars,
    TaskID,
    TextColumn,
)


class Progress:
    """Shows how far a job is, on a terminal; elsewhere it prints nothing.

    Args:
        console: Where to show it.
        ranks: Processes to be started.
        steps: Steps of each request, by id.

    """

    def __init__(self, console: Console, ranks: int, steps: Mapping[str, int]) -> None:
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=40),
            MofNCompleteColumn(),
            console=console,
            transient=True,
            refresh_per_second=5,
            disable=not console.is_terminal,
        )
        self._start = self._bars.add_task("starting ranks", total=ranks)
        self._measure: TaskID | None = None
        self._requests = {
            name: self._bars.add_task(f"request {name}", total=count)
            for name, count in steps.items()
        }

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def started(self, ranks: int) -> None:
        """So many ranks are ready."""
        self._bars.update(self._start, completed=ranks)

    def advanced(self, request: str) -> None:
        """A request is a step further."""
        if request in self._requests:  # a warm-up is not shown
            self._bars.advance(self._requests[request])

    def measured(self, done: int, total: int) -> None:
        """So many rounds of the measurement of overlap are over."""
        if self._measure is None:
            self._measure = self._bars.add_task("measuring overlap", total=total)
        self._bars.update(self._measure, completed=done)
