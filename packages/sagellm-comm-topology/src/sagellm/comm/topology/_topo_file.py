"""The topology file that a user or a cloud names for NCCL, believed before all detectors.

`NCCL_TOPO_FILE`, else the place where NVIDIA's topology daemon puts the file of a virtual machine.
"""

from __future__ import annotations

import os

from sagellm.core.protocols import (
    DetectionContext,
    IntegrityError,
    TopologyFragment,
)

from ._input import read_regular

__all__ = ["TopoFileDetector"]

_DEFAULT = "/var/run/nvidia-topologyd/virtualTopology.xml"


class TopoFileDetector:
    """Reads the file if there is one, in any format that importers know."""

    def detect(self, ctx: DetectionContext) -> TopologyFragment:
        """What the file says, never raising; see `Detector`."""
        named = ctx.environ.get("NCCL_TOPO_FILE", "")
        path = os.fspath(ctx.root).rstrip("/") + "/" + (named or _DEFAULT).lstrip("/")
        if named and os.fspath(ctx.root) == "/":
            path = os.path.abspath(named)  # as NCCL opens it: from where the process is
        try:
            data = read_regular(path)
        except OSError as e:
            if not named:
                return TopologyFragment("topo-file")
            return _nothing(f"NCCL_TOPO_FILE {named}: {e.strerror or e}")
        from .importers import read_fragment  # needed only where there is a file

        try:
            return read_fragment(data, source="topo-file")
        except IntegrityError as e:
            return _nothing(f"{named or _DEFAULT}: {e}")


def _nothing(warning: str) -> TopologyFragment:
    return TopologyFragment("topo-file", warnings=(warning,))
