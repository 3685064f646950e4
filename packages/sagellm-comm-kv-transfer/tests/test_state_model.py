"""The table of states holds against every two faults, and the exploration finds weakenings.

A fault is a cut link, a message lost, repeated or out of order, a frame that comes twice or
damaged, a crash with or without a restart, a cancel or a deadline.
"""

import runpy
from pathlib import Path

import pytest

from sagellm.comm.kv_transfer.state import (
    RULES,
    TABLE,
    Event,
    Limit,
    Phase,
    Role,
    Step,
    as_markdown,
)

_model = runpy.run_path(str(Path(__file__).with_name("state_world.py")))
World, explore, BrokenError = (_model[n] for n in ("World", "explore", "BrokenError"))
S, R = Role.SEND, Role.RECEIVE


def test_without_faults_both_attempts_land_on_both_sides():
    states, ends = explore(World(), 0)

    assert states > 100
    for end in ends:
        phases = {p.phase for side in (S, R) for p in end.parts[side]}
        assert phases == {Phase.RELEASED}, phases
        assert end.ever == {0, 1}


@pytest.mark.timeout(600)
def test_no_two_faults_break_an_invariant():
    states, _ = explore(World(), 2)

    assert states > 50_000


def changed(role, phase, event, step):
    """The table with one step replaced, or taken away."""
    table = {r: {p: dict(steps) for p, steps in phases.items()} for r, phases in TABLE.items()}
    if step is None:
        del table[role][phase][event]
    else:
        table[role][phase][event] = step
    return table


def ruled(phase, **values):
    """The rules with one phase changed."""
    return {**RULES, phase: RULES[phase]._replace(**values)}


WEAKENED = {
    "blocks are safe before the reader is idle": (
        {"rules": ruled(Phase.FAILING, safe=True)},
        "given back",
    ),
    "a cancel gives blocks back at once": (
        {"table": changed(R, Phase.ACCEPTED, Event.CANCEL, Step(Phase.CANCELLED, "fail"))},
        "given back",
    ),
    "the epoch of a frame is not looked at": ({"weak": "epoch unchecked"}, "other bytes"),
    "damage is not looked for": ({"weak": "unverified"}, "other bytes"),
    "done is said when it is accepted": (
        {"table": changed(R, Phase.OFFERED, Event.ACCEPT, Step(Phase.ACCEPTED, "done"))},
        "not verified",
    ),
    "a grant is taken for a landing": (
        {"table": changed(S, Phase.OFFERED, Event.ACCEPT, Step(Phase.SETTLING))},
        "not verified",
    ),
    "accepted has no deadline": (
        {"rules": ruled(Phase.ACCEPTED, limit=Limit.NONE, at_limit=None)},
        "nothing ends accepted",
    ),
    "landed has no deadline": (
        {"rules": ruled(Phase.LANDED, limit=Limit.NONE, at_limit=None)},
        "nothing ends landed",
    ),
    "released does not count as landed": (
        {"rules": ruled(Phase.RELEASED, landed=False)},
        "does not count",
    ),
    "failed counts as landed": (
        {"rules": ruled(Phase.FAILED, landed=True)},
        "counts as landed",
    ),
    "nobody listens for the release": (
        {"table": changed(R, Phase.LANDED, Event.RELEASE, None)},
        "nothing ends landed",
    ),
    "a lost link fails what has landed": (
        {
            "table": changed(R, Phase.LANDED, Event.FAULT, Step(Phase.FAILED)),
            "rules": ruled(Phase.LANDED, at_limit=Event.FAULT),
        },
        "does not count",
    ),
    "failing keeps its lease": ({"rules": ruled(Phase.FAILED, safe=False)}, "held for ever"),
    "a fault ends nothing while it moves": (
        {"table": changed(S, Phase.MOVING, Event.FAULT, None)},
        "nothing ends moving",
    ),
    "a cancel is not told": (
        {"table": changed(R, Phase.ACCEPTED, Event.CANCEL, Step(Phase.CANCELLING, ""))},
        "never told",
    ),
}


@pytest.mark.parametrize("weakness", WEAKENED)
def test_the_exploration_finds_each_weakening(weakness):
    arguments, match = WEAKENED[weakness]

    with pytest.raises(BrokenError, match=match):
        explore(World(**arguments), 2)


def test_an_offer_that_its_invitation_hides_does_not_land():
    _, ends = explore(World(weak="offer ignored"), 0)

    assert any(p.phase is not Phase.RELEASED for end in ends for p in end.parts[S])


def test_the_readme_prints_the_table_that_decides():
    readme = (Path(__file__).parents[1] / "README.md").read_text()

    assert as_markdown() in readme
