"""The wheel's build hook: compile the C engine of shm where that is possible, else leave it out."""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_PACKAGE = "sagellm/comm/collective_ops/_shm"


class NativeEngineHook(BuildHookInterface[Any]):
    """Adds `_sage_shm.so`, and the platform to the wheel's tag; needs no particular Python."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        folder = Path(self.root) / "src" / _PACKAGE
        spec = importlib.util.spec_from_file_location("_sage_shm_build", folder / "build.py")
        assert spec is not None
        assert spec.loader is not None
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        editable = version == "editable"
        wrong = None if editable and build.is_current() else build.compile_library()
        if wrong:
            build.TARGET.unlink(missing_ok=True)  # of an earlier build, perhaps for another machine
            self.app.display_warning(f"the C engine of shm is left out: {wrong}")
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
        if editable:
            build.mark_current()
        else:
            build_data["force_include"][str(build.TARGET)] = f"{_PACKAGE}/{build.TARGET.name}"
