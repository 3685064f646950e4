"""When overlapping is worth it, and how far it may run ahead."""

from __future__ import annotations

from dataclasses import dataclass

from sagellm.core.protocols import ConfigError

__all__ = ["OverlapPolicy"]


@dataclass(frozen=True, slots=True)
class OverlapPolicy:
    """The knobs of an `OverlapManager`; all of them must be equal on all ranks.

    Attributes:
        min_gain: Predicted saving, as a share of the serial time, below which a plan whose
            costs are all known runs serially.
        max_inflight: Communications that one lane may have in flight before it issues the next.
        min_tokens: Default for `overlap_batches`: fewer tokens run one batch after another.
        abort_group: After an error that left communications of a run unissued, abort the
            manager's group, so that peers fail at once and not at their deadline. The group is
            out of step then and could not be used again anyway.

    """

    min_gain: float = 0.05
    max_inflight: int = 4
    min_tokens: int = 0
    abort_group: bool = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.min_gain < 1.0:
            raise ConfigError(f"min_gain {self.min_gain} is not in [0, 1)")
        if self.max_inflight < 1:
            raise ConfigError(f"max_inflight {self.max_inflight} is not at least 1")
        if self.min_tokens < 0:
            raise ConfigError(f"min_tokens {self.min_tokens} is negative")
