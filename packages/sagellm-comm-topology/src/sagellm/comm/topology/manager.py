"""The topology of this host, of the whole job, and answers to questions about either."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path as FilePath

from sagellm.core.protocols import (
    Affinity,
    CommandResult,
    ConfigError,
    DetectionContext,
    DetectorSpec,
    Device,
    DeviceKind,
    LinkKind,
    Path,
    Store,
    TopologyInfo,
    TopologyManagerProtocol,
)

from . import placement
from ._numbers import whole_number
from ._sysfs import Tree
from .detector import installed_detectors, make_context, run_detectors
from .graph import TopologyGraph
from .merge import merge
from .visibility import apply_visibility, visible_indices

__all__ = ["TopologyManager"]


class TopologyManager(TopologyManagerProtocol):
    """Finds the devices and links of this host and answers questions about them.

    Without arguments it looks at this machine. Nothing is looked at before the first question.
    After `gather`, `rank_map`, `ring` and `islands` speak of the whole job; `path`, `nearest` and
    `affinity` take the ids of either topology. All methods are thread-safe.

    Args:
        root: Where `/sys`, `/proc` and `/dev` are looked for; a recorded tree stands in for a
            machine.
        environ: Environment that decides which devices are visible and, for `gather`, `RANK` and
            `WORLD_SIZE`; None is this process's, read at each detection.
        run: Runs command-line tools for detectors that need them; None runs them here.
        clock: Monotonic seconds.
        detectors: What to run instead of the installed detectors.
        allow_commands: Whether detectors may run command-line tools, at 0.3-2 s each.
        rank: This process's rank for `gather`; None is `RANK`, else 0.
        world_size: Number of ranks for `gather`; None is `WORLD_SIZE`, else 1.
        labels: Where this host is, for `gather`: `rack` and `spine`, either or none.

    """

    def __init__(
        self,
        *,
        root: FilePath | str = "/",
        environ: Mapping[str, str] | None = None,
        run: Callable[[Sequence[str], float], CommandResult] | None = None,
        clock: Callable[[], float] = time.monotonic,
        detectors: Iterable[DetectorSpec] | None = None,
        allow_commands: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        self._root = FilePath(root)
        self._environ = environ
        self._run = run
        self._clock = clock
        self._detectors = None if detectors is None else tuple(detectors)
        self._allow_commands = allow_commands
        self._rank = rank
        self._world_size = world_size
        self._labels = dict(labels or {})
        self._looking = threading.Lock()
        self._lock = threading.Lock()
        self._local: TopologyGraph | None = None
        self._job: TopologyGraph | None = None

    def detect(self, *, refresh: bool = False, deadline_s: float = 1.0) -> TopologyInfo:
        """The topology of this host; the first call looks, later ones answer from memory.

        Args:
            refresh: Look again even when an answer is in memory.
            deadline_s: Longest time in seconds; what has not answered by then is left out and
                named in a warning.

        Raises:
            ConfigError: `deadline_s` is not above 0.

        """
        if not deadline_s > 0:
            raise ConfigError(f"deadline_s must be above 0, not {deadline_s}")
        return self._here(refresh=refresh, deadline_s=deadline_s).info

    def _here(self, *, refresh: bool = False, deadline_s: float = 1.0) -> TopologyGraph:
        """The graph of this host. One thread looks; others wait for it as long as they may."""
        known = self._local
        if known is not None and not refresh:
            return known
        start_s = time.monotonic()
        if not self._looking.acquire(timeout=min(deadline_s, threading.TIMEOUT_MAX)):
            told = "another thread is still looking at this machine; ask again, or with more time"
            return self._local or TopologyGraph(merge((), warnings=(told,)))
        try:
            if self._local is None or refresh:
                left_s = max(deadline_s / 2, deadline_s - (time.monotonic() - start_s))
                self._local = TopologyGraph(self._look(left_s))
            return self._local
        finally:
            self._looking.release()

    def gather(self, store: Store, *, timeout_s: float) -> TopologyInfo:
        """The topology of every rank's host. Collective: every rank of the store calls it.

        Ranks come from the constructor, else from `RANK` and `WORLD_SIZE`. Rank 0 waits for the
        others for half of `timeout_s`, then publishes one topology that all ranks return. What
        ranks of one host see differently, as in containers of their own, is put together.
        Device ids get the prefix `n<node>/`; nodes are numbered by their lowest rank.

        Raises:
            CommTimeoutError: Rank 0's agreed result did not arrive. Ranks that are merely
                missing do not raise: they are named in `missing_nodes` and in a warning.
            CollectiveMismatchError: This rank was agreed to be missing, and rank 0 is at another
                call by now: ranks were restarted, or did not call equally often.
            ConfigError: Rank and world size do not fit, or `timeout_s` is not above 0.

        """
        from ._gather import gather  # brings msgspec: a third of what importing us would cost

        info = self.detect()
        context = self._context(1.0)
        agreed = gather(
            info,
            store,
            root=self._root,
            rank=_number(self._rank, context.environ, "RANK", 0),
            world_size=_number(self._world_size, context.environ, "WORLD_SIZE", 1),
            timeout_s=timeout_s,
            labels=self._labels,
        )
        with self._lock:
            self._job = TopologyGraph(agreed)
        return agreed

    def device(self, local_rank: int) -> Device:
        """The accelerator that this process sees as `local_rank`.

        Raises:
            ConfigError: There is no such device; the message lists what is visible.

        """
        visible = [d for d in self.detect().accelerators if d.visible_index is not None]
        for device in visible:
            if local_rank in visible_indices(device):
                return device
        listed = ", ".join(f"{i}: {d.id}" for d in visible for i in visible_indices(d))
        raise ConfigError(f"no accelerator {local_rank} is visible; visible: {listed or 'none'}")

    def path(self, a: str, b: str) -> Path:
        """The best path between two devices, by id.

        Raises:
            ConfigError: An id is unknown; the message names the nearest ones.

        """
        return self._graph_of(a, b).path(a, b)

    def nearest(self, device: str, kind: DeviceKind) -> Device | None:
        """The device of that kind with the best path from `device`; None if there is none.

        Only devices of the same host are candidates; one whose path is unknown is none.

        Raises:
            ConfigError: The id is unknown.

        """
        return placement.nearest(self._graph_of(device), device, kind)

    def affinity(self, device: str) -> Affinity:
        """CPUs and NUMA nodes local to a device; never a node without CPUs.

        Raises:
            ConfigError: The id is unknown.

        """
        return placement.affinity(self._graph_of(device), device)

    def islands(self, kind: LinkKind) -> tuple[tuple[str, ...], ...]:
        """Groups of at least two accelerators that reach each other over links of `kind` alone."""
        return self._widest_graph().components(kind)

    def rank_map(self, tp: int, pp: int = 1, dp: int = 1, ep: int = 1) -> tuple[str, ...]:
        """Device id for each global rank, with tensor-parallel groups on the fastest links.

        Ranks are numbered with tp fastest, then ep, pp, dp, as Megatron-LM does. Before a
        `gather` only devices visible to this process are used.

        Raises:
            ConfigError: A degree is below 1, or tp * pp * dp * ep exceeds the accelerators.

        """
        graph = self._widest_graph()
        # What other processes see is theirs: after a gather no device counts as hidden.
        return placement.rank_map(graph, tp, pp, dp, ep, visible_only=graph is not self._job)

    def ring(self, group: Sequence[str]) -> tuple[str, ...]:
        """The members of `group` in the order of a ring with the widest bottleneck found.

        The first member stays first; equal calls give equal rings.

        Raises:
            ConfigError: An id is unknown or comes twice.

        """
        return placement.ring(self._graph_of(*group), group)

    def trees(self, group: Sequence[str]) -> tuple[dict[str, str | None], dict[str, str | None]]:
        """Two trees over `group` that together use every port both ways; parents by name.

        Raises:
            ConfigError: An id is unknown or comes twice.

        """
        return placement.trees(self._graph_of(*group), group)

    def graph(self) -> TopologyGraph:
        """The graph of the whole job after `gather`, before it of this host."""
        return self._widest_graph()

    def _context(self, deadline_s: float) -> DetectionContext:
        return make_context(
            root=self._root,
            environ=self._environ,
            run=self._run,
            clock=self._clock,
            deadline_s=deadline_s,
            allow_commands=self._allow_commands,
        )

    def _look(self, deadline_s: float) -> TopologyInfo:
        context = self._context(deadline_s)
        specs = installed_detectors() if self._detectors is None else self._detectors
        found = run_detectors(specs, context)
        info = merge(found.fragments, warnings=found.warnings, hostname=self._hostname())
        return apply_visibility(info, context.environ)

    def _hostname(self) -> str:
        if self._root == FilePath("/"):
            return os.uname().nodename
        return Tree(self._root).read("/proc/sys/kernel/hostname") or ""

    def _widest_graph(self) -> TopologyGraph:
        if self._job is not None:
            return self._job
        return self._here()

    def _graph_of(self, *ids: str) -> TopologyGraph:
        """The graph that knows all the ids: this host's, else the job's."""
        here = self._here()
        if self._job is not None and any(here.info.find(i) is None for i in ids):
            return self._job
        return here


def _number(given: int | None, environ: Mapping[str, str], name: str, default: int) -> int:
    if given is not None:
        return given
    text = environ.get(name)
    if text is None:
        return default
    number = whole_number(text)
    if number is None:
        raise ConfigError(f"{name} must be a number, not {text[:40]!r}")
    return number
