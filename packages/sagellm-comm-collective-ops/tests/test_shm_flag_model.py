"""Every interleaving of the flag protocol of `_shm/layout.py`, for a few mixed calls.

A rank is a program of small steps: wait, store, publish, read. Plain stores (slot and signature)
become visible in any order and as late as the next publication, which has release order. The
explorer visits every reachable state and checks what each read sees.
"""

from dataclasses import dataclass

import pytest

EVERYONE = None
ALL_REDUCE = (EVERYONE,)
TWO_SHOT = (EVERYONE, EVERYONE, EVERYONE)


def broadcast(root, steps):
    return ({root},) * steps


def gather(root, steps):
    """Only the root reads."""
    return tuple({"root": root} for _ in range(steps))


@dataclass(frozen=True)
class Rules:
    waits_before_writing: bool = True
    signature_parities: int = 2
    release: bool = True


RULES = Rules()


def program(world, rank, calls, rules):
    """Micro-steps of one rank: (kind, step, call, peer)."""
    step, out = 0, []
    peers = [r for r in range(world) if r != rank]
    for call, reads in enumerate(calls):
        for index, sources in enumerate(reads):
            step += 1
            if sources is EVERYONE:
                needed = peers
            elif isinstance(sources, dict):
                needed = peers if rank == sources["root"] else []
            else:
                needed = [p for p in peers if p in sources]
            if rules.waits_before_writing:
                out += [("wait", step - 1, call, p) for p in peers]
            out += [("write", step, call, rank), ("publish", step, call, rank)]
            out += [("wait", step, call, p) for p in (peers if index == 0 else needed)]
            if index == 0:
                out += [("compare", step, call, p) for p in peers]
            out += [("read", step, call, p) for p in needed]
    return tuple(out)


def fault(world, calls, rules=RULES):
    """The first wrong read or deadlock that some interleaving leads to; None if there is none."""
    programs = [program(world, rank, calls, rules) for rank in range(world)]
    start = ((0,) * world, (0,) * world, (0,) * (2 * world), (-1,) * (2 * world), ((),) * world)
    seen, stack = {start}, [start]
    while stack:
        state = stack.pop()
        after, wrong = successors(programs, state, rules)
        if wrong:
            return wrong
        if not after and any(pc < len(p) for pc, p in zip(state[0], programs, strict=True)):
            return f"deadlock at {state[0]}"
        fresh = [s for s in after if s not in seen]
        seen.update(fresh)
        stack += fresh
    assert len(seen) > 50  # it did explore
    return None


def put(values, index, value):
    return (*values[:index], value, *values[index + 1 :])


def successors(programs, state, rules):
    counters, sequence, slots, signatures, pending = state
    out = []
    for rank, steps in enumerate(programs):
        for i, (kind, where, value) in enumerate(pending[rank]):  # a store becomes visible
            rest = put(pending, rank, pending[rank][:i] + pending[rank][i + 1 :])
            new_slots = put(slots, where, value) if kind == "slot" else slots
            new_signatures = put(signatures, where, value) if kind == "signature" else signatures
            out.append((counters, sequence, new_slots, new_signatures, rest))

        if counters[rank] == len(steps):
            continue
        kind, step, call, peer = steps[counters[rank]]
        moved = put(counters, rank, counters[rank] + 1)
        slot, word = 2 * peer + step % 2, 2 * peer + step % rules.signature_parities
        if kind == "wait":
            if sequence[peer] >= step:
                out.append((moved, sequence, slots, signatures, pending))
        elif kind == "write":
            stores = (("slot", slot, step), ("signature", word, call))
            waiting = put(pending, rank, pending[rank] + stores)
            out.append((moved, sequence, slots, signatures, waiting))
        elif kind == "publish":
            if not rules.release or not pending[rank]:
                out.append((moved, put(sequence, rank, step), slots, signatures, pending))
        elif kind == "compare":
            if signatures[word] != call:
                return [], f"rank {rank} compares call {call} with {signatures[word]} of {peer}"
            out.append((moved, sequence, slots, signatures, pending))
        else:
            if slots[slot] != step:
                return [], f"rank {rank} reads step {slots[slot]} of {peer} at step {step}"
            out.append((moved, sequence, slots, signatures, pending))
    return out, None


MIXED = {
    "two ranks": (2, (ALL_REDUCE, broadcast(0, 2), TWO_SHOT, gather(1, 2), ALL_REDUCE)),
    "two ranks, two roots": (2, (broadcast(0, 3), broadcast(1, 3), gather(0, 3), ALL_REDUCE)),
    "three ranks": (3, (broadcast(0, 2), ALL_REDUCE)),
    "three ranks, gather": (3, (gather(0, 2), broadcast(1, 1))),
}


@pytest.mark.parametrize(("world", "calls"), MIXED.values(), ids=MIXED)
def test_nothing_is_overwritten_while_it_can_be_read(world, calls):
    assert fault(world, calls) is None


def test_without_the_wait_before_a_write_a_slot_is_overwritten():
    found = fault(2, (broadcast(0, 2), ALL_REDUCE), Rules(waits_before_writing=False))

    assert "reads step" in found


def test_with_signatures_in_one_place_a_call_is_taken_for_the_next():
    found = fault(2, (ALL_REDUCE, ALL_REDUCE), Rules(signature_parities=1))

    assert "compares call 0 with 1" in found


def test_without_release_order_a_peer_reads_what_is_not_there_yet():
    assert fault(2, (ALL_REDUCE,), Rules(release=False)) is not None
