"""One accelerator fabric out of what several sources say of it.

Sources describe one fabric as wires, as a switch under a name of their own, or in part. Who is
believed first speaks for a device: what others say of its links of that kind only fills gaps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from sagellm.core.protocols import Device, Link, SwitchDomain, TopologyFragment

from .graph import FABRIC_KINDS

__all__ = ["Speakers", "drop_idle_switches", "fabric_speakers", "is_overruled", "merge_domains"]

Speakers: TypeAlias = dict[tuple[str, str], int]
"""Accelerator and kind of link to the number of the first fragment that says anything of both."""


def fabric_speakers(
    fragments: Sequence[TopologyFragment], devices: Mapping[str, Device], names: Mapping[str, str]
) -> Speakers:
    """Who speaks for which accelerator; fragments come the most trusted first."""
    speakers: Speakers = {}
    for number, fragment in enumerate(fragments):
        ends = [(end, x.kind) for x in fragment.links for end in (x.a, x.b)]
        ends += [(member, d.kind) for d in fragment.domains for member in d.members]
        for end, kind in ends:
            device = devices.get(names.get(end, end))
            if device is not None and device.kind in ("gpu", "npu") and kind in FABRIC_KINDS:
                speakers.setdefault((device.id, kind), number)
    return speakers


def is_overruled(a: str, b: str, kind: str, number: int, speakers: Speakers) -> bool:
    """Whether others, believed more than this fragment, speak for both ends of a link."""
    heard = [speakers[end, kind] for end in (a, b) if (end, kind) in speakers]
    return bool(heard) and all(other < number for other in heard)


def merge_domains(
    fragments: Sequence[TopologyFragment],
    devices: dict[str, Device],
    names: dict[str, str],
    speakers: Speakers,
    notes: list[str],
) -> list[SwitchDomain]:
    """Domains by id; those of one kind with members in common are one, under the first's name."""
    domains: dict[str, SwitchDomain] = {}
    for number, fragment in enumerate(fragments):
        earlier = dict(domains)
        for domain in fragment.domains:
            members = tuple(names.get(m, m) for m in domain.members)
            absent = [m for m in members if m not in devices]
            if absent:
                notes.append(f"{fragment.source}: {domain.id} names unknown member {absent[0]}")
                members = tuple(m for m in members if m in devices)
            mine = [m for m in members if speakers.get((m, domain.kind), number) == number]
            same = [
                d for d in earlier.values()
                if d.kind == domain.kind and not set(members).isdisjoint(d.members)
            ]  # fmt: skip
            known = domains.get(domain.id) or next((domains[d.id] for d in same), None)
            if known is not None:
                domains[known.id] = _joined(known, domain, mine)
                _rename(domain.id, known.id, devices, names)
            elif members and not mine:
                notes.append(
                    f"{fragment.source}: {domain.id} left out; sources that are believed more say "
                    "how its members are joined"
                )
            else:
                domains[domain.id] = replace(domain, members=tuple(mine))
    return sorted(domains.values(), key=lambda d: d.id)


def drop_idle_switches(
    ends: Iterable[str], devices: dict[str, Device], links: Mapping[tuple[str, str, str], Link]
) -> None:
    """Drop those of the ends that are switches and no PCI function, if nothing leads to them."""
    used = {end for a, b, _ in links for end in (a, b)}
    for end in ends:
        if end not in used and devices[end].kind == "fabric_switch" and devices[end].bdf is None:
            del devices[end]


def _joined(known: SwitchDomain, other: SwitchDomain, more: Sequence[str]) -> SwitchDomain:
    rate = known.port_bandwidth_bytes_per_s
    return replace(
        known,
        members=tuple(dict.fromkeys((*known.members, *more))),
        clique=known.clique or other.clique,
        port_bandwidth_bytes_per_s=rate or other.port_bandwidth_bytes_per_s,
    )


def _rename(old: str, new: str, devices: dict[str, Device], names: dict[str, str]) -> None:
    """Let the links of a switch lead to the same switch's other name."""
    if old == new:
        return
    names[old] = new
    switch = devices.pop(old, None)
    if switch is not None:
        devices.setdefault(new, replace(switch, id=new))
