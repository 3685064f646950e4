"""Schedules of the real `Sending`, `Receiving` and `Offering` over links that a test moves.

A fault is a link cut, a message lost, repeated or late, a frame damaged or repeated, a crash with a
restart, a cancel or a deadline. Each seed is one schedule, and is named when it breaks something.
"""

import os

import pytest
from sim_node import BrokenError, install
from sim_world import World, explore

from sagellm.comm.kv_transfer import transfer
from sagellm.comm.kv_transfer._arrivals import Arrivals
from sagellm.comm.kv_transfer._engine import Engine
from sagellm.comm.kv_transfer._flows import Flow, Inflow
from sagellm.comm.kv_transfer._limits import Watch
from sagellm.comm.kv_transfer._offering import Offering
from sagellm.comm.kv_transfer._receive import Receive
from sagellm.comm.kv_transfer._sending import Sending
from sagellm.comm.kv_transfer.state import TABLE, Event, Phase, Role

ROUNDS = int(os.environ.get("SAGELLM_KV_SCHEDULES", "400"))


@pytest.fixture(autouse=True)
def simulated(monkeypatch):
    install(monkeypatch)


def explore_all(sound, rough):
    """So many schedules without and with faults; the steps that were made."""
    return explore(range(sound), faults=0) + explore(range(1000, 1000 + rough), faults=3)


def test_without_faults_everything_lands_on_all_sides():
    assert explore(range(80), faults=0) > 8_000


def test_no_schedule_with_faults_breaks_an_invariant():
    assert explore_all(60, ROUNDS) > 40_000


def test_schedules_reach_what_is_to_be_explored():
    seen, phases = set(), set()
    for seed in range(80):
        world = World(seed, 3)
        world.run()
        for step in world.trace:
            words = step.replace("FAULT ", "").split()
            seen |= {words[1], words[2] if words[1] == "hears" else words[0]}
        for node in world.nodes.values():
            phases |= {(what, h.phase) for (what, _), h in node.handles.items() if what != "stream"}

    assert {"Offer", "Grant", "Invite", "Nack", "Done", "Release", "Fail", "KeyFail", "Fetch",
            "LayerDone", "Sealed", "cancels", "crashes", "loses"} <= seen  # fmt: skip
    ends = {Phase.RELEASED, Phase.FAILED, Phase.CANCELLED}
    assert {(what, end) for what in ("send", "receive") for end in ends} <= phases


def a_thread_may_still_be_there(monkeypatch):
    monkeypatch.setattr(Flow, "busy", False)


def a_frame_is_taken_after_the_end(monkeypatch):
    claim = Inflow.claim

    def anyway(flow, head):
        flow.stopped = False
        return claim(flow, head)

    monkeypatch.setattr(Inflow, "claim", anyway)


def damage_does_not_count(monkeypatch):
    landed = Inflow.landed
    monkeypatch.setattr(Inflow, "landed", lambda flow, head, bad: landed(flow, head, []))


def one_sender_is_enough(monkeypatch):
    monkeypatch.setattr(
        Receive,
        "complete",
        property(lambda r: bool(r.sources) and all(s.inflow.complete for s in r.sources)),
    )


def a_layer_is_taken_for_all(monkeypatch):
    monkeypatch.setattr(
        Sending, "on_layer_done", lambda sending, link, m: sending.on_done(link, m.tid)
    )


def nothing_is_watched(monkeypatch):
    monkeypatch.setattr(Watch, "follow", lambda watch: None)


def a_cancel_is_not_told(monkeypatch):
    def quiet(steps):
        gone = {e: s._replace(tells="") for e, s in steps.items() if e is Event.CANCEL}
        return {**steps, **gone}

    table = {r: {p: quiet(steps) for p, steps in phases.items()} for r, phases in TABLE.items()}
    monkeypatch.setattr(transfer, "TABLE", {**table, Role.OFFER: TABLE[Role.OFFER]})
    monkeypatch.setattr(Engine, "gossip", lambda engine, key, error, told: None)


def an_invitation_is_kept_beside_an_offer(monkeypatch):
    monkeypatch.setattr(Arrivals, "withdraw", lambda arrivals, r, link: None)


def an_offer_ends_while_it_is_read(monkeypatch):
    finish = Offering._finish

    def at_once(offering, o):
        o.served = set()
        finish(offering, o)

    monkeypatch.setattr(Offering, "_finish", at_once)


def an_end_before_its_beginning_is_followed_by_it(monkeypatch):
    begin, watch = Sending._begin, Sending._watch

    def anyway(sending, p, link):
        if p.error is not None:
            watch(sending, p)
        begin(sending, p, link)

    monkeypatch.setattr(Sending, "_begin", anyway)


@pytest.mark.parametrize(
    ("weaken", "match"),
    [
        (a_thread_may_still_be_there, "given back"),
        (a_frame_is_taken_after_the_end, "given back"),
        (damage_does_not_count, "other bytes"),
        (one_sender_is_enough, "other bytes"),
        (a_layer_is_taken_for_all, "nobody has verified"),
        (nothing_is_watched, "nothing ends"),
        (a_cancel_is_not_told, "never told"),
        (an_invitation_is_kept_beside_an_offer, "did not land"),
        (an_offer_ends_while_it_is_read, "given back"),
        (an_end_before_its_beginning_is_followed_by_it, "held for ever"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_the_schedules_find_each_weakening_of_the_code(monkeypatch, weaken, match):
    weaken(monkeypatch)

    with pytest.raises(BrokenError, match=match):
        explore_all(40, 400)
