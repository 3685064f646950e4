"""The topology file that a user or a cloud names for NCCL, believed before all detectors.

`NCCL_TOPO_FILE`, else the place where NVIDIA's topology daemon puts the file of a virtual machine.
"""

from __future__ import annotations

import os
import stat

from sagellm.core.protocols import (
    DetectionContext,
    IntegrityError,
    TopologyFragment,
)

__all__ = ["TopoFileDetector"]

_DEFAULT = "/var/run/nvidia-topologyd/virtualTopology.xml"
_MAX_BYTES = 64 << 20


class TopoFileDetector:
    """Reads the file if there is one, in any format that importers know."""

    def detect(self, ctx: DetectionContext) -> TopologyFragment:
        """What the file says, never raising; see `Detector`."""
        named = ctx.environ.get("NCCL_TOPO_FILE", "")
        path = os.fspath(ctx.root).rstrip("/") + "/" + (named or _DEFAULT).lstrip("/")
        try:
            data = _content(path)
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


def _content(path: str) -> bytes:
    """Bytes of a regular file; a pipe or a device is refused without waiting for it."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(f"{path} is no regular file")
        if facts.st_size > _MAX_BYTES:
            raise OSError(f"{path} has {facts.st_size} bytes, more than the {_MAX_BYTES} read")
        return file.read(_MAX_BYTES)
