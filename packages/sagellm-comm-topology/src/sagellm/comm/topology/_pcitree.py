"""How chains of PCI bridges fold into switches.

A PCIe switch is an upstream port with downstream ports beneath it. Below a host bridge the ports
alternate: root port, upstream, downstream, upstream, … so every second bridge of a function's
chain stands for one switch, and its downstream ports fold into it. A root port becomes a vertex
only when several functions share it (the two ports of one NIC, say).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

__all__ = ["vertices_above"]


def vertices_above(is_bridge: Sequence[bool], sharers: int) -> Iterator[tuple[int, bool]]:
    """Positions in a function's chain that are vertices, nearest first, and if it is a root port.

    Args:
        is_bridge: Of what is above the function, from the host bridge down. What is no bridge but
            has a bus behind it (Intel VMD) starts a new hierarchy.
        sharers: Functions that hang directly below the last one of the chain.

    """
    depths, level = [], 0
    for bridge in is_bridge:
        level = level + 1 if bridge else 0
        depths.append(level)
    for i in range(len(depths) - 1, -1, -1):
        is_switch = depths[i] > 0 and depths[i] % 2 == 0
        is_root_port = depths[i] == 1 and i == len(depths) - 1 and sharers > 1
        if is_switch or is_root_port:
            yield i, is_root_port
