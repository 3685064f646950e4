"""The adapter from `CommBackendProtocol` to torch process groups; the only module with torch."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["completed_future"]


def completed_future(
    result: object, error: BaseException | None = None
) -> torch.futures.Future[Any]:  # torch fixes the value type per backend
    """A torch future that is already set to `result`, or to `error`."""
    future: torch.futures.Future[Any] = torch.futures.Future()
    if isinstance(error, Exception):
        future.set_exception(error)
    else:
        future.set_result(result)
    return future
