"""What a running transfer shows: a bar on a terminal, counts for the end of any run."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self

from sagellm.core.protocols import TransferMetrics
from sagellm.core.protocols.show import bytes_text, rate_text

__all__ = ["Live"]


class Live:
    """Counts transfers and shows them while it is open; one thread.

    Args:
        what: Word for the line, such as `send`.
        total: Bytes expected; None where nobody knows.
        quiet: Show nothing on the way.

    """

    def __init__(self, what: str, total: int | None = None, *, quiet: bool = False) -> None:
        self._what = what
        self._total = total
        self._quiet = quiet or not sys.stderr.isatty()
        self._progress: Any = None  # rich's, only on a terminal
        self._started: float | None = None
        self._last = 0.0
        self.bytes = self.wire_bytes = self.transfers = self.retries = 0
        self.runs = self.syscalls = 0
        self.queue_s = self.wire_s = self.verify_s = 0.0
        self.failures: dict[str, int] = {}
        self.path = ""

    def __enter__(self) -> Self:
        if not self._quiet:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
                TransferSpeedColumn,
            )

            self._progress = Progress(
                TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True),
                TransferSpeedColumn(), TextColumn("{task.fields[path]}"),
                TextColumn("{task.fields[retries]} retries"), TimeElapsedColumn(),
                console=Console(stderr=True), transient=True,
            )  # fmt: skip
            self._progress.start()
            self._task = self._progress.add_task(
                self._what, total=self._total, path=self.path, retries=0
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def begin(self) -> None:
        """The clock runs from here, or from the first transfer."""
        if self._started is None:
            self._started = time.monotonic()

    def show(self, moving_bytes: int = 0, path: str = "") -> None:
        """Redraw, with bytes of transfers that have not ended."""
        if moving_bytes:
            self.begin()
        self.path = path or self.path
        if self._progress is not None:
            self._progress.update(
                self._task, completed=self.bytes + moving_bytes, path=self.path,
                retries=self.retries,
            )  # fmt: skip

    def landed(self, metrics: TransferMetrics) -> None:
        """Count a transfer that succeeded."""
        self.begin()
        self._last = time.monotonic()
        self.transfers += 1
        self.bytes += metrics.bytes
        self.wire_bytes += metrics.wire_bytes
        self.runs += metrics.runs
        self.syscalls += metrics.syscalls
        self.retries += metrics.retries
        self.queue_s += metrics.queue_s
        self.wire_s += metrics.wire_s
        self.verify_s += metrics.verify_s
        self.path = metrics.path or self.path
        self.show()

    def failed(self, cause: str) -> None:
        """Count one that did not."""
        self.failures[cause] = self.failures.get(cause, 0) + 1

    @property
    def seconds(self) -> float:
        """From the beginning to the last end."""
        return max(0.0, self._last - self._started) if self._started is not None else 0.0

    def report(self) -> dict[str, Any]:  # Any: JSON
        """Everything counted."""
        rate = self.bytes / self.seconds if self.seconds > 0 else None
        return {
            "bytes": self.bytes,
            "wire_bytes": self.wire_bytes,
            "seconds": self.seconds,
            "bytes_per_s": rate,
            "transfers": self.transfers,
            "failures": dict(self.failures),
            "path": self.path,
            "retries": self.retries,
            "runs": self.runs,
            "syscalls": self.syscalls,
            "queue_s": self.queue_s,
            "wire_s": self.wire_s,
            "verify_s": self.verify_s,
        }

    def line(self) -> str:
        """Everything counted, for people."""
        rate = f"{rate_text(self.bytes / self.seconds)} GB/s" if self.seconds > 0 else "-"
        lost = "".join(f", {n} failed ({cause})" for cause, n in sorted(self.failures.items()))
        return (
            f"{self._what}: {bytes_text(self.bytes)} in {self.seconds:.3f} s, {rate}, "
            f"{self.transfers} transfers over {self.path or 'no path'}, "
            f"{self.retries} retries{lost}"
        )
