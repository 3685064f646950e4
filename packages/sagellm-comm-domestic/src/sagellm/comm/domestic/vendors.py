"""The vendor table: rows of facts, and the names by which a row is found.

Nobody ran any of it on a device here. Grades: `vendor-source` was read in the vendor's source,
`vendor-document` stands in a vendor's or framework's document, `third-party` in somebody else's
repository, `unverified` nowhere that could be read. A capability that is not known is left out,
so that a call is refused by name rather than tried.
"""

from __future__ import annotations

import difflib
from types import MappingProxyType

from sagellm.core.protocols import ConfigError

from ._rows_cuda_alias import HYGON, ILUVATAR, KUNLUN, METAX
from ._rows_own_device import (
    ASCEND,
    BIREN,
    BIREN_1,
    CAMBRICON,
    ENFLAME,
    MOORE_THREADS,
    TECORIGIN,
)
from .vendor_spec import VendorSpec

__all__ = ["ALIASES", "AMBIGUOUS", "VENDORS", "find_vendor"]

_ROWS = (
    ASCEND,
    CAMBRICON,
    MOORE_THREADS,
    HYGON,
    KUNLUN,
    METAX,
    ILUVATAR,
    ENFLAME,
    BIREN,
    BIREN_1,
    TECORIGIN,
)

VENDORS = MappingProxyType({row.backend: row for row in _ROWS})
"""Every row by backend name, best known first; `auto` asks in this order."""

ALIASES = MappingProxyType({alias: row.backend for row in _ROWS for alias in row.aliases})
"""Other names to backend names. Decisions: `hccl` is Ascend's and never Habana's, `mccl` is
Moore Threads' and never MetaX's library of that name, and `xccl`, which torch gives to Intel's
oneCCL, is Kunlunxin's here, because Intel makes no domestic accelerator; it is an alias of
this factory alone and no plug-in name, so `create_comm_backend("xccl")` keeps torch's meaning."""

AMBIGUOUS = MappingProxyType(
    {
        "nccl": "hygon, kunlun, metax and iluvatar all answer to torch's nccl; name the vendor, "
        'or use create_comm_backend("nccl") on an NVIDIA device',
        "rccl": "AMD's and Hygon's library share the name; name hygon, or use "
        'create_comm_backend("rccl") on an AMD device',
        "xpu": "torch's device xpu is Intel's; Kunlunxin is named kunlun",
        "gloo": 'gloo is no vendor\'s; use create_comm_backend("gloo")',
    }
)
"""Names that several vendors or none could mean, with what to say instead."""


def find_vendor(name: str) -> VendorSpec:
    """The row of that backend name or alias.

    >>> find_vendor("ascend").key, find_vendor("xccl").vendor
    (('huawei', 'hccl'), 'kunlun')

    Raises:
        ConfigError: No such name, or one that several vendors share; the message lists the
            names there are.

    """
    wanted = name.strip().lower()
    row = VENDORS.get(ALIASES.get(wanted, wanted))
    if row is not None:
        return row
    if wanted in AMBIGUOUS:
        raise ConfigError(f"domestic backend {name!r} is ambiguous: {AMBIGUOUS[wanted]}")
    near = difflib.get_close_matches(wanted, [*VENDORS, *ALIASES], n=1)
    text = f"no domestic backend {name!r}; there are auto, {', '.join(VENDORS)}"
    raise ConfigError(f"{text}; did you mean {near[0]!r}?" if near else text)
