"""From what `schedule` takes - callables, (fn, args), lists of them - to a graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeGuard

from sagellm.core.protocols import ConfigError, Pairing, Task, TaskId

from .scheduler import TaskGraph

__all__ = ["pair_up"]


def pair_up(
    graph: TaskGraph,
    compute: Task | Sequence[Task],
    comm: Task | Sequence[Task],
    pairing: Pairing,
) -> None:
    """Fill a graph with compute and communication tasks, paired or independent.

    A single pair of tasks is independent. In a `zip` of lists, communication i waits for compute
    i, and gets its result if it has exactly one positional parameter without a default.

    Raises:
        ConfigError: Lists of different lengths, an unknown pairing, a task that is not callable,
            or one that needs arguments which nobody gives it.

    """
    if pairing not in ("zip", "none"):
        raise ConfigError(f"pairing {pairing!r} is not one of 'zip', 'none'")
    single = _is_task(compute) and _is_task(comm)
    computes, comms = _listed(compute, "compute"), _listed(comm, "comm")
    zipped = pairing == "zip" and not single
    if zipped and len(computes) != len(comms):
        raise ConfigError(
            f"pairing 'zip' needs lists of one length, got {len(computes)} compute and "
            f"{len(comms)} communication tasks; use pairing='none' for independent lists"
        )
    for kind, listed, given in (("compute", computes, 0), ("comm", comms, int(zipped))):
        for at, (_, needs) in enumerate(listed):
            if needs > given:
                raise ConfigError(
                    f"{kind} task {at} needs {needs} arguments: give it as (fn, args)"
                )
    for at in range(max(len(computes), len(comms))):
        made: tuple[TaskId, ...] = ()
        if at < len(computes):
            fn, _ = computes[at]
            made = (graph.compute(fn, name=_name(fn, "compute", at)),)
        if at < len(comms):
            fn, needs = comms[at]
            task = graph.comm(fn, *(made if needs else ()), name=_name(fn, "comm", at))
            if zipped and not needs:
                graph.after(task, *made)


def _is_task(task: object) -> TypeGuard[Task]:
    bound = isinstance(task, tuple) and len(task) == 2 and callable(task[0])
    return callable(task) or (bound and isinstance(task[1], (tuple, list)))  # type: ignore[index]  # bound: a pair


def _listed(
    tasks: Task | Sequence[Task], kind: str
) -> list[tuple[Callable[..., Any], int]]:  # the user's functions
    if _is_task(tasks):
        items: Sequence[Any] = [tasks]
    elif isinstance(tasks, Sequence) and not isinstance(tasks, (str, bytes)):
        items = tasks
    else:
        raise ConfigError(f"{kind} is {tasks!r}: neither callable, (fn, args), nor a list of those")
    listed: list[tuple[Callable[..., Any], int]] = []
    for at, item in enumerate(items):
        if not _is_task(item):
            raise ConfigError(f"{kind} task {at} is {item!r}: neither callable nor (fn, args)")
        if isinstance(item, tuple):
            _check_arguments(item[0], item[1], f"{kind} task {at}")
            listed.append((partial(item[0], *item[1]), 0))
        else:
            listed.append((item, _required(item)))
    return listed


def _check_arguments(fn: Callable[..., Any], args: Sequence[Any], what: str) -> None:  # as above
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # some builtins have none
        return
    try:
        signature.bind(*args)
    except TypeError as error:
        raise ConfigError(
            f"{what} takes other arguments than the {len(args)} given: {error}"
        ) from None


def _required(fn: Callable[..., Any]) -> int:  # the user's function
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return 0
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and p.default is p.empty for p in parameters)


def _name(fn: Callable[..., Any], kind: str, at: int) -> str:  # the user's function
    inner = fn.func if isinstance(fn, partial) else fn
    own = getattr(inner, "__name__", "")
    return f"{kind}{at}" if not isinstance(own, str) or own in ("", "<lambda>") else f"{own}[{at}]"
