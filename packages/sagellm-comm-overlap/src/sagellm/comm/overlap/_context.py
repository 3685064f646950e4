"""The caller's thread state, carried to the lanes that work for it."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from ._values import Foreign

__all__ = ["CallerContext"]

_AUTOCAST_DEVICES = ("cpu", "cuda", "xpu")


class CallerContext:
    """Inference mode, grad mode, autocast, intra-op threads and context variables of a thread.

    torch keeps the first four per thread, and a new thread has the defaults: without this a
    function would compute other things on a lane than where it was written.
    """

    __slots__ = ("_autocast", "_grad", "_inference", "_plain", "_threads", "_variables")

    def __init__(self) -> None:
        self._variables = contextvars.copy_context()
        self._inference = torch.is_inference_mode_enabled()
        self._grad = torch.is_grad_enabled()
        self._threads = torch.get_num_threads()
        devices = (*_AUTOCAST_DEVICES, torch._C._get_privateuse1_backend_name())
        cache = torch.is_autocast_cache_enabled()
        self._autocast = [
            (device, torch.get_autocast_dtype(device), cache)
            for device in devices
            if torch.is_autocast_enabled(device)
        ]
        self._plain = self._grad and not self._inference and not self._autocast

    def for_lane(self) -> contextvars.Context:
        """A copy of the context variables for one lane: a context may not be in two threads."""
        return self._variables.copy()

    def call(
        self,
        variables: contextvars.Context,
        fn: Callable[..., Any],  # a task: takes and returns what its graph says
        args: tuple[Any, ...],
    ) -> Foreign:
        """Call a function on this thread as the caller's thread would have."""
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        if self._plain:
            return variables.run(fn, *args)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self._inference))
            stack.enter_context(torch.set_grad_enabled(self._grad))
            for device, dtype, cache in self._autocast:
                stack.enter_context(torch.autocast(device, dtype, cache_enabled=cache))
            return variables.run(fn, *args)
