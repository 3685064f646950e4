"""Runs a vendor's tool: no input, plain locale, a deadline, bounded output, nothing left behind."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import IO

from sagellm.core.protocols import CommandResult

__all__ = ["MAX_OUTPUT_BYTES", "run_command"]

MAX_OUTPUT_BYTES = 16 << 20
"""Most that a tool may print; topologies of a thousand devices take less than a tenth."""


def run_command(command: Sequence[str], timeout_s: float) -> CommandResult:
    """What the tool prints; it and all that it started are ended when it fails us.

    Raises:
        FileNotFoundError: There is no such tool.
        TimeoutError: It, or what it started and left its output to, is not done in time.
        OSError: It cannot be run, or prints more than `MAX_OUTPUT_BYTES`.

    """
    deadline_s = time.monotonic() + timeout_s
    process = subprocess.Popen(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "LC_ALL": "C"},
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stdout, process.stderr:
        try:
            out, err = _read([process.stdout, process.stderr], deadline_s)
            code = process.wait(max(0.0, deadline_s - time.monotonic()))
        except (TimeoutError, subprocess.TimeoutExpired):
            raise TimeoutError(f"{command[0]} did not answer within {timeout_s} s") from None
        finally:
            if process.returncode is None:
                # Not yet reaped, so that the group's number is still its own.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return CommandResult(code, out.decode("utf-8", "replace"), err.decode("utf-8", "replace"))


def _read(pipes: Sequence[IO[bytes]], deadline_s: float) -> list[bytes]:
    """All that is written to the pipes until every writer has closed them."""
    texts = [bytearray() for _ in pipes]
    with selectors.DefaultSelector() as waiting:
        for pipe, text in zip(pipes, texts, strict=True):
            waiting.register(pipe, selectors.EVENT_READ, text)
        while waiting.get_map():
            ready = waiting.select(max(0.0, deadline_s - time.monotonic()))
            if not ready:
                raise TimeoutError
            for key, _ in ready:
                part = os.read(key.fd, 1 << 16)
                key.data.extend(part)
                if not part:
                    waiting.unregister(key.fileobj)
            if sum(map(len, texts)) > MAX_OUTPUT_BYTES:
                raise OSError(f"it prints more than {MAX_OUTPUT_BYTES} bytes")
            if time.monotonic() > deadline_s:
                raise TimeoutError
    return [bytes(text) for text in texts]
