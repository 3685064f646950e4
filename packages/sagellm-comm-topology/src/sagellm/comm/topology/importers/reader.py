"""Reads a file of any known format.

Nothing is fetched, run or trusted: sizes are bounded, XML has no DTD or entities, and what cannot
be read is a warning of the fragment. Only a file of no known format is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

from sagellm.core.protocols import ConfigError, IntegrityError, TopologyFragment, TopologyInfo

from ._text import plain_lines

__all__ = ["FORMATS", "Format", "import_topology", "is_json", "read_fragment"]

Format = Literal["json", "nccl-xml", "hwloc-xml", "matrix", "rocm", "lspci", "nvidia-smi-list"]
"""Names of the formats. `nccl-xml` is RCCL's too; `matrix` is `topo -m` of NVIDIA, MetaX, Moore
Threads, Iluvatar, Kunlun and Cambricon, `topo -p2p`, `npu-smi info -t topo` and our own."""

FORMATS: tuple[Format, ...] = get_args(Format)
"""Every format that can be read."""

_LEADING = b"\xef\xbb\xbf \t\r\n"

USER_FILE = 100
"""Precedence of a file that a user names."""


def known_format(name: str | None) -> Format | None:
    """The format of that name; None stays None.

    Raises:
        ConfigError: There is no such format; the message lists the known ones.

    """
    for form in FORMATS:
        if name == form:
            return form
    if name is None:
        return None
    raise ConfigError(f"unknown format {name!r}; known: {', '.join(FORMATS)}")


def import_topology(
    data: bytes,
    *,
    form: Format | None = None,
    vendor: str | None = None,
    source: str = "",
) -> TopologyInfo:
    """The topology that a file describes, by itself; several hosts are joined.

    Args:
        data: The file's content.
        form: Its format; None tells it by the content.
        vendor: Maker of the accelerators, for text that names none (`iluvatar`, …).
        source: Name of the source in links and warnings; "" is the tool's.

    Raises:
        IntegrityError: The content is of no known format, too large, or forbidden XML.
        ConfigError: `form` is not known.

    """
    form = known_format(form)
    if is_json(data, form):
        from sagellm.comm.topology.export import from_json

        return from_json(data)  # as it was written, hosts and all
    from sagellm.comm.topology.merge import merge

    hosts = [merge([(USER_FILE, f)]) for f in _fragments(data, form, vendor, source)]
    if len(hosts) == 1:
        return hosts[0]
    from sagellm.comm.topology._join import join_hosts

    return join_hosts(hosts)


def read_fragment(
    data: bytes,
    *,
    form: Format | None = None,
    vendor: str | None = None,
    source: str = "",
) -> TopologyFragment:
    """What a file says of one host, to be merged with what others say; see `import_topology`."""
    found, *others = _fragments(data, known_format(form), vendor, source)
    told = [f"{1 + len(others)} hosts in one file; only the first is read"] if others else []
    return _told(found, told)


def _fragments(
    data: bytes, form: Format | None, vendor: str | None, source: str
) -> list[TopologyFragment]:
    """What a file says of each host in it."""
    start = data[:512].lstrip(_LEADING)
    if form in ("nccl-xml", "hwloc-xml") or (form is None and start.startswith(b"<")):
        return _xml(data, source)
    if is_json(data, form):
        return [_json(data, source)]
    return [_text(data, form, vendor, source)]


def is_json(data: bytes, form: Format | None = None) -> bool:
    """Whether it is read as JSON: because of the form that is asked for, else of how it begins."""
    start = data[:512]
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        start = start.decode("utf-16", "replace").encode()
    start = start.lstrip(_LEADING)
    return form == "json" or (form is None and start.startswith((b"{", b"[")))


def _xml(data: bytes, source: str) -> list[TopologyFragment]:
    from ._xml import parse_xml
    from .hwloc_xml import read_hwloc
    from .nccl_xml import read_nccl, split_hosts

    warnings: list[str] = []
    root = parse_xml(data, warnings)
    if root.tag in ("system", "graphs"):
        found = [read_nccl(host, source=source) for host in split_hosts(root)]
    elif root.tag == "topology":
        found = [read_hwloc(root, source=source)]
    else:
        raise IntegrityError(
            f"XML of <{root.tag[:40]}>; NCCL writes <system>, hwloc writes <topology>"
        )
    return [_told(fragment, warnings) for fragment in found]


def _json(data: bytes, source: str) -> TopologyFragment:
    from sagellm.comm.topology.export import from_json

    info = from_json(data)
    return TopologyFragment(
        source or "json", info.devices, info.links, info.domains, info.warnings, pairs=info.pairs
    )


def _text(data: bytes, form: Format | None, vendor: str | None, source: str) -> TopologyFragment:
    from .lists import read_lspci, read_smi_list
    from .matrix import read_matrix
    from .rocm import looks_like_rocm, read_rocm

    warnings: list[str] = []
    lines = plain_lines(data, warnings)
    readers: dict[Format, Callable[..., TopologyFragment | None]] = {
        "rocm": read_rocm,
        "matrix": read_matrix,
        "nvidia-smi-list": read_smi_list,
        "lspci": read_lspci,
    }
    order: Sequence[Format] = [form] if form else list(readers)
    for name in order:
        if name == "rocm" and form is None and not looks_like_rocm(lines):
            continue
        found = readers[name](lines, source=source, vendor=vendor)
        if found is not None:
            return _told(found, warnings)
    raise IntegrityError(
        f"no {form or 'known format'} in {len(data)} bytes of text; known: {', '.join(FORMATS)}"
    )


def _told(fragment: TopologyFragment, warnings: list[str]) -> TopologyFragment:
    from dataclasses import replace

    return replace(fragment, warnings=(*warnings, *fragment.warnings))
