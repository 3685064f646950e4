"""The states of a transfer and every step between them.

The table is the whole truth: handles move only along it, the documentation prints it, and a
test walks it. LANDED on the receiver means received in full and verified; on the sender, that
the receiver has said so. RELEASED means that both sides know.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from sagellm.core.protocols import TransferState as State

__all__ = ["TRANSITIONS", "advance"]

TRANSITIONS: Mapping[State, frozenset[State]] = MappingProxyType(
    {
        State.OFFERED: frozenset({State.ACCEPTED, State.MOVING, State.FAILED, State.CANCELLED}),
        State.ACCEPTED: frozenset({State.MOVING, State.LANDED, State.FAILED, State.CANCELLED}),
        State.MOVING: frozenset({State.LANDED, State.FAILED, State.CANCELLED}),
        State.LANDED: frozenset({State.RELEASED}),
        State.RELEASED: frozenset(),
        State.FAILED: frozenset(),
        State.CANCELLED: frozenset(),
    }
)
"""From each state, the states that may follow."""


def advance(current: State, new: State) -> State:
    """The new state, if the table allows the step.

    >>> advance(State.MOVING, State.LANDED)
    <TransferState.LANDED: 'landed'>

    Raises:
        AssertionError: It does not, which is a bug of this package.

    """
    if new not in TRANSITIONS[current]:
        raise AssertionError(f"a transfer cannot go from {current.value} to {new.value}")
    return new
