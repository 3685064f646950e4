"""The one table that says how a transfer lives and ends.

The channel decides by it, the README prints it, and a test explores it together with a network
that loses, repeats and reorders messages and with sides that stop, crash and come back.

Whoever has no row for an event ignores it: a message of an earlier epoch, or one that comes
twice, does nothing but be counted. An epoch is a transfer id on a link; neither is used again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple

from sagellm.core.protocols import TransferState as State

__all__ = [
    "RULES",
    "TABLE",
    "TRANSITIONS",
    "Event",
    "Limit",
    "Phase",
    "Role",
    "Rule",
    "Step",
    "as_markdown",
]


class Role(StrEnum):
    """What a node does in a transfer."""

    SEND = "send"
    RECEIVE = "receive"
    OFFER = "offer"


class Phase(StrEnum):
    """Where a transfer is on one side: its state, and how it is about to leave that."""

    OFFERED = "offered"
    ACCEPTED = "accepted"
    MOVING = "moving"
    SETTLING = "settling"
    FAILING = "failing"
    CANCELLING = "cancelling"
    LANDED = "landed"
    RELEASED = "released"
    FAILED = "failed"
    CANCELLED = "cancelled"

    __hash__ = str.__hash__  # looked up several times per transfer; that of enums is slow


class Event(StrEnum):
    """What happens to a transfer on one side.

    `accept`: both sides know what moves (a grant, an invitation that is taken, a fetch).
    `frame`: a piece was written, or is in place and verified. `complete`: everything is in place
    and verified, on the side that receives it. `done`: the receiver says so. `release`: the
    sender knows that. `fault`: its deadline, its lease, damage, a lost link, a refusal, or the
    other side's fault. `cancel`: somebody on either side gave up. `idle`: no thread is at its
    blocks.
    """

    ACCEPT = "accept"
    FRAME = "frame"
    COMPLETE = "complete"
    DONE = "done"
    RELEASE = "release"
    FAULT = "fault"
    CANCEL = "cancel"
    IDLE = "idle"

    __hash__ = str.__hash__


class Limit(StrEnum):
    """How long a phase may last."""

    DEADLINE = "its deadline"
    QUIESCE = "quiesce_s"
    NONE = "for ever"


class Step(NamedTuple):
    """What an event leads to, and what the other side is told."""

    to: Phase
    tells: str = ""


class Rule(NamedTuple):
    """What holds in a phase.

    Attributes:
        state: What callers see.
        moves: Whether a thread may begin a piece.
        safe: Whether no thread can be at the blocks, so that their lease is over.
        limit: How long it may last.
        at_limit: What happens then, and when its link is lost; None breaks the data connection, so
            that threads leave.
        landed: Whether everything is in place and verified, and callers may know.

    """

    state: State
    moves: bool
    safe: bool
    limit: Limit
    at_limit: Event | None = None
    landed: bool = False


RULES: Mapping[Phase, Rule] = MappingProxyType(
    {
        Phase.OFFERED: Rule(State.OFFERED, True, False, Limit.DEADLINE, Event.FAULT),
        Phase.ACCEPTED: Rule(State.ACCEPTED, True, False, Limit.DEADLINE, Event.FAULT),
        Phase.MOVING: Rule(State.MOVING, True, False, Limit.DEADLINE, Event.FAULT),
        Phase.SETTLING: Rule(State.MOVING, False, False, Limit.QUIESCE),
        Phase.FAILING: Rule(State.MOVING, False, False, Limit.QUIESCE),
        Phase.CANCELLING: Rule(State.MOVING, False, False, Limit.QUIESCE),
        Phase.LANDED: Rule(State.LANDED, False, True, Limit.DEADLINE, Event.RELEASE, landed=True),
        Phase.RELEASED: Rule(State.RELEASED, False, True, Limit.NONE, landed=True),
        Phase.FAILED: Rule(State.FAILED, False, True, Limit.NONE),
        Phase.CANCELLED: Rule(State.CANCELLED, False, True, Limit.NONE),
    }
)
"""What holds in each phase."""

_GIVE_UP = {Event.FAULT: Step(Phase.FAILING, "fail"), Event.CANCEL: Step(Phase.CANCELLING, "fail")}
_GONE = {
    Phase.FAILING: {Event.FRAME: Step(Phase.FAILING), Event.IDLE: Step(Phase.FAILED)},
    Phase.CANCELLING: {Event.FRAME: Step(Phase.CANCELLING), Event.IDLE: Step(Phase.CANCELLED)},
}

TABLE: Mapping[Role, Mapping[Phase, Mapping[Event, Step]]] = MappingProxyType(
    {
        Role.SEND: {
            Phase.OFFERED: {
                Event.ACCEPT: Step(Phase.ACCEPTED),
                Event.DONE: Step(Phase.SETTLING, "release"),
                **_GIVE_UP,
            },
            Phase.ACCEPTED: {
                Event.FRAME: Step(Phase.MOVING),
                Event.DONE: Step(Phase.SETTLING, "release"),
                **_GIVE_UP,
            },
            Phase.MOVING: {
                Event.FRAME: Step(Phase.MOVING),
                Event.DONE: Step(Phase.SETTLING, "release"),
                **_GIVE_UP,
            },
            Phase.SETTLING: {
                Event.FRAME: Step(Phase.SETTLING),
                Event.IDLE: Step(Phase.RELEASED),
            },
            **_GONE,
        },
        Role.RECEIVE: {
            Phase.OFFERED: {
                Event.ACCEPT: Step(Phase.ACCEPTED, "grant"),
                Event.FRAME: Step(Phase.MOVING),
                **_GIVE_UP,
            },
            Phase.ACCEPTED: {
                Event.ACCEPT: Step(Phase.ACCEPTED, "grant"),
                Event.FRAME: Step(Phase.MOVING),
                Event.COMPLETE: Step(Phase.LANDED, "done"),
                **_GIVE_UP,
            },
            Phase.MOVING: {
                Event.ACCEPT: Step(Phase.MOVING, "grant"),
                Event.FRAME: Step(Phase.MOVING),
                Event.COMPLETE: Step(Phase.LANDED, "done"),
                **_GIVE_UP,
            },
            Phase.LANDED: {Event.RELEASE: Step(Phase.RELEASED)},
            **_GONE,
        },
        Role.OFFER: {
            Phase.OFFERED: {Event.ACCEPT: Step(Phase.ACCEPTED), **_GIVE_UP},
            Phase.ACCEPTED: {
                Event.ACCEPT: Step(Phase.ACCEPTED),
                Event.DONE: Step(Phase.SETTLING),
                **_GIVE_UP,
            },
            Phase.SETTLING: {Event.IDLE: Step(Phase.RELEASED)},
            **_GONE,
        },
    }
)
"""By role and phase, what each event leads to. Ended phases have no rows."""


def _transitions() -> Iterator[tuple[State, State]]:
    for phases in TABLE.values():
        for phase, steps in phases.items():
            for step in steps.values():
                yield RULES[phase].state, RULES[step.to].state


TRANSITIONS: Mapping[State, frozenset[State]] = MappingProxyType(
    {s: frozenset(b for a, b in _transitions() if a is s is not b) for s in State}
)
"""From each state that callers see, those that may follow."""


def as_markdown() -> str:
    """The table for people."""
    lines = ["| role | phase | event | next | the other side is told |", "|---|---|---|---|---|"]
    for role, phases in TABLE.items():
        for phase, steps in phases.items():
            for event, step in steps.items():
                told = f"`{step.tells}`" if step.tells else "-"
                lines.append(f"| {role} | {phase} | {event} | {step.to} | {told} |")
    lines += ["", "| phase | state | blocks | landed | lasts at most | then |"]
    lines += ["|---|---|---|---|---|---|"]
    for phase, rule in RULES.items():
        blocks = "safe" if rule.safe else "in use" if rule.moves else "fenced"
        then = rule.at_limit or ("-" if rule.limit is Limit.NONE else "the connection is broken")
        landed = "yes" if rule.landed else "no"
        lines.append(f"| {phase} | {rule.state} | {blocks} | {landed} | {rule.limit} | {then} |")
    return "\n".join(lines)
