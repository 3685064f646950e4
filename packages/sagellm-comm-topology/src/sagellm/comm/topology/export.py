"""A topology as JSON, as NCCL's XML, and as the matrix that people know."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from sagellm.core.protocols import Device, IntegrityError, TopologyInfo

from ._fragment_check import checked
from ._nccl_export import to_nccl_xml as to_nccl_xml
from .graph import TopologyGraph

__all__ = [
    "SCHEMA",
    "column_labels",
    "from_json",
    "pair_label",
    "to_json",
    "to_matrix",
    "to_nccl_xml",
]

SCHEMA = "sagellm.topology/1"
"""Schema of the JSON; readers ignore fields they do not know."""

_LANE_NAMES = {
    "nvlink": "NV", "xgmi": "XGMI", "hccs": "HCCS", "sio": "SIO", "ub": "UB", "mlulink": "MLK",
    "metaxlink": "MX", "mtlink": "MT", "ixlink": "IX", "xpulink": "XL", "c2c": "C2C",
}  # fmt: skip
_COUNTED = ("nvlink", "mtlink", "mlulink", "xpulink")
_VIA_NAMES = {"pcie": "PCIE", "ethernet": "ETH", "xgmi": "XGMI"}
_MAX_JSON_BYTES = 256 << 20


class _Document(msgspec.Struct):
    """The JSON file: the schema's name and the topology."""

    topology: TopologyInfo
    schema: str = SCHEMA


def to_json(info: TopologyInfo) -> str:
    """The topology as indented JSON; None stays null."""
    text = msgspec.json.encode({"schema": SCHEMA, "topology": info})
    return msgspec.json.format(text, indent=1).decode()


def from_json(text: str | bytes) -> TopologyInfo:
    """The topology that `to_json` wrote.

    Raises:
        IntegrityError: It is no such JSON, of another schema, larger than 256 MiB, or says what
            cannot be, such as two devices of one id. Links and members that end nowhere, and a
            fingerprint that is not that of the content, are put right with a warning.

    """
    if isinstance(text, bytes):
        if text[:2] in (b"\xff\xfe", b"\xfe\xff"):
            text = text.decode("utf-16", "replace").encode()  # as PowerShell writes
        text = text.removeprefix(b"\xef\xbb\xbf")
    if len(text) > _MAX_JSON_BYTES:
        raise IntegrityError(f"topology of {len(text)} bytes, more than {_MAX_JSON_BYTES}")
    try:
        document = msgspec.json.decode(text, type=_Document)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as e:
        raise IntegrityError(f"not a topology: {e}") from e
    if document.schema != SCHEMA:
        raise IntegrityError(f"topology of schema {document.schema!r}; this reads {SCHEMA}")
    return checked(document.topology)


def to_matrix(info: TopologyInfo) -> str:
    """Accelerators and NICs against each other, tab-separated, as `nvidia-smi topo -m` prints.

    Unknown paths, CPUs and NUMA nodes are `?`. Lines below name the makers, and the NICs by their
    RDMA names, interfaces or addresses; `import_topology` reads them back.
    """
    graph = TopologyGraph(info)
    nics = [d for d in info.devices if d.kind == "nic"]
    shown = [*info.accelerators, *nics]
    labels = column_labels(shown)
    lines = ["\t".join(["", *labels, "CPU Affinity", "NUMA Affinity"])]
    for row, device in enumerate(shown):
        cells = [pair_label(graph, device, other) for other in shown]
        numa = ",".join(map(str, device.numa_nodes)) or "?"
        lines.append("\t".join([labels[row], *cells, device.cpulist or "?", numa]))
    lines += _vendor_lines(info.accelerators, labels)
    if nics:
        lines += ["", "NIC Legend:"]
        first = len(info.accelerators)
        for i, nic in enumerate(nics):
            name = nic.attrs.get("ib") or nic.attrs.get("netdev") or nic.id
            lines.append(f"  {labels[first + i]}: {name}")
    return "\n".join(lines) + "\n"


def _vendor_lines(accelerators: Sequence[Device], labels: Sequence[str]) -> list[str]:
    """What says whose the accelerators are: a reader must not guess it by the layout."""
    vendors = {d.vendor for d in accelerators}
    if not vendors:
        return []
    if len(vendors) == 1:
        return ["", f"Vendor of accelerators: {vendors.pop() or '?'}"]
    pairs = zip(accelerators, labels, strict=False)  # labels of NICs follow
    return ["", *(f"Vendor of {label}: {d.vendor or '?'}" for d, label in pairs)]


def column_labels(devices: list[Device]) -> list[str]:
    """GPU0, NPU0, NIC0, … in the given order."""
    counts: dict[str, int] = {}
    labels = []
    for device in devices:
        number = counts.get(device.kind, 0)
        counts[device.kind] = number + 1
        labels.append(f"{device.kind.upper()}{number}")
    return labels


def pair_label(graph: TopologyGraph, a: Device, b: Device) -> str:
    """`X`, `NV18`, `HCCS`, `PIX`, … or `?` for a pair of devices."""
    if a.id == b.id:
        return "X"
    path = graph.path(a.id, b.id)
    if path.kind == "LINK":
        kind = path.links[0].kind
        if kind == "hccs" and len(path.links) > 1:
            return "HCCS_SW"
        name = _LANE_NAMES.get(kind, "LINK")
        counted = kind in _COUNTED or max(x.count for x in path.links) > 1
        return f"{name}{min(x.count for x in path.links)}" if counted else name
    pair = graph.stated(a.id, b.id)
    if path.kind is None and pair is not None and pair.via is not None:
        return _VIA_NAMES.get(pair.via, "?")
    return path.kind or "?"
