"""Whose torch this is, when the device is called `cuda`.

NVIDIA, AMD, Hygon, MetaX, Kunlunxin and Iluvatar all answer `torch.cuda.is_available()`. What
tells them apart is how torch was built, and for AMD and Hygon the chip.
"""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import dataclass
from typing import Any

from .host import HostView

__all__ = ["CudaVendor", "TorchBuild", "classify_cuda", "read_torch_build"]

_HYGON_ARCHS = frozenset({"gfx926", "gfx928", "gfx936", "gfx938"})
_HYGON_NAMES = re.compile(r"^(Z100|K100|BW\d|DCU)", re.IGNORECASE)
_HYGON_PCI_VENDOR = 0x1D94


@dataclass(frozen=True, slots=True)
class TorchBuild:
    """What can be known of the installed torch without opening a device.

    Attributes:
        version: torch's version with its local part (`2.13.0+cpu`); empty without torch.
        cuda: CUDA version it was built for, or None.
        hip: HIP version it was built for, or None.
        maca: MACA version it was built for, or None.
        corex: Whether a sign of Iluvatar's CoreX was found.
        xmlir: Whether Kunlunxin's torch_xmlir is installed.
        archs: AMD-style names of the chips (`gfx906`), from the kernel.
        hygon_signs: Signs of Hygon on this host, in words.
        device_name: Name of device 0 when somebody has asked for it already.

    """

    version: str = ""
    cuda: str | None = None
    hip: str | None = None
    maca: str | None = None
    corex: bool = False
    xmlir: bool = False
    archs: tuple[str, ...] = ()
    hygon_signs: tuple[str, ...] = ()
    device_name: str = ""


@dataclass(frozen=True, slots=True)
class CudaVendor:
    """Who is behind `cuda`: a vendor, or None for a torch without it; and the reason."""

    vendor: str | None
    reason: str


def classify_cuda(build: TorchBuild) -> CudaVendor:
    """The vendor behind `cuda`, by the first sign that holds.

    >>> classify_cuda(TorchBuild(version="2.6.0", cuda="11.6", maca="3.0")).vendor
    'metax'
    >>> classify_cuda(TorchBuild(version="2.6.0", hip="6.1", archs=("gfx906",))).vendor
    'amd'
    """
    if build.hip is not None:
        return _classify_hip(build)
    if build.maca is not None:
        return CudaVendor("metax", f"torch.version.maca is {build.maca}")
    if "+metax" in build.version:
        return CudaVendor("metax", f"torch is {build.version}")
    if build.xmlir:
        return CudaVendor("kunlun", "torch_xmlir is installed")
    if build.corex:
        return CudaVendor("iluvatar", f"torch {build.version} shows signs of CoreX")
    if build.device_name.startswith("Iluvatar"):
        return CudaVendor("iluvatar", f"the device is {build.device_name}")
    if build.cuda is not None:
        return CudaVendor("nvidia", f"torch {build.version} is built for CUDA {build.cuda}")
    if not build.version:
        return CudaVendor(None, "torch is not installed")
    return CudaVendor(None, f"torch {build.version} is built without CUDA, HIP or MACA")


def _classify_hip(build: TorchBuild) -> CudaVendor:
    own = sorted(_HYGON_ARCHS.intersection(build.archs))
    if own:
        return CudaVendor("hygon", f"HIP build of torch and a {own[0]}")
    if _HYGON_NAMES.match(build.device_name):
        return CudaVendor("hygon", f"HIP build of torch and a {build.device_name}")
    if build.hygon_signs:
        return CudaVendor("hygon", f"HIP build of torch and {build.hygon_signs[0]}")
    # gfx906 alone is AMD's MI50 as well as Hygon's Z100.
    return CudaVendor("amd", f"torch.version.hip is {build.hip} and nothing shows Hygon")


def read_torch_build(view: HostView) -> TorchBuild:
    """Facts of the installed torch; it is not imported for this, and no device is opened."""
    facts = _version_facts(view)
    version = str(facts.get("__version__") or view.distribution_version("torch") or "")
    distribution = view.distribution_version("torch") or ""
    corex = (
        "+corex" in f"{version} {distribution}"
        or bool(view.environ.get("COREX_HOME"))
        or bool(facts.get("corex"))
        or (view.root / "usr/local/corex").is_dir()
    )
    if "+metax" in distribution and "+metax" not in version:
        version = distribution
    return TorchBuild(
        version=version,
        cuda=_text(facts.get("cuda")),
        hip=_text(facts.get("hip")),
        maca=_text(facts.get("maca")),
        corex=corex,
        xmlir=view.find_module("torch_xmlir"),
        archs=_kfd_archs(view),
        hygon_signs=_hygon_signs(view, f"{version} {distribution}"),
    )


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _version_facts(view: HostView) -> dict[str, Any]:  # Any: constants of torch's version.py
    if view.loaded("torch"):
        torch = sys.modules.get("torch")
        facts = dict(vars(getattr(torch, "version", None) or object).items())
        facts["corex"] = hasattr(torch, "corex")
        return facts
    path = view.torch_version_file()
    if path is None:
        return {}
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return {}
    found: dict[str, Any] = {}  # Any: as above
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign):
            targets = [node.target]
        value = getattr(node, "value", None)
        if isinstance(value, ast.Constant):
            found.update((t.id, value.value) for t in targets if isinstance(t, ast.Name))
    return found


def _kfd_properties(view: HostView) -> list[dict[str, int]]:
    nodes: list[dict[str, int]] = []
    for path in sorted(view.root.glob("sys/class/kfd/kfd/topology/nodes/*/properties")):
        try:
            pairs = (line.split() for line in path.read_text().splitlines())
            nodes.append({p[0]: int(p[1]) for p in pairs if len(p) == 2 and p[1].isdigit()})
        except OSError:
            continue
    return nodes


def _kfd_archs(view: HostView) -> tuple[str, ...]:
    archs: list[str] = []
    for node in _kfd_properties(view):
        target = node.get("gfx_target_version", 0)
        if target:
            major, minor, step = target // 10000, target // 100 % 100, target % 100
            archs.append(f"gfx{major}{minor:x}{step:x}")
    return tuple(archs)


def _hygon_signs(view: HostView, versions: str) -> tuple[str, ...]:
    signs: list[str] = []
    if any(node.get("vendor_id") == _HYGON_PCI_VENDOR for node in _kfd_properties(view)):
        signs.append(f"a device of PCI vendor {_HYGON_PCI_VENDOR:#06x}")
    signs += [f"/{place}" for place in ("opt/hyhal", "opt/dtk") if (view.root / place).is_dir()]
    if re.search(r"\+das|dtk", versions):
        signs.append(f"torch {versions.split()[0]}")
    return tuple(signs)
