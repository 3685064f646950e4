"""Ask a vendor's plug-in in a process of its own whether it sees a device.

An import that failed half-way cannot be undone, and only one vendor with a device type of its
own can live in a process: so the question is put in another one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping

from sagellm.core.protocols import Probe

from .runtime import missing_piece
from .vendor_spec import VendorSpec

__all__ = ["probe_in_process"]

_SCRIPT = """
import importlib, json, sys
module, device = sys.argv[1:]
answer = {"stage": "import torch"}
try:
    import torch
    if module:
        answer["stage"] = "import " + module
        importlib.import_module(module)
    answer["stage"] = "torch.%s.is_available()" % device
    api = getattr(torch, device)
    answer["count"] = int(api.device_count()) if api.is_available() else 0
except BaseException as e:
    answer["error"] = "%s: %s" % (type(e).__name__, e)
print("\\n@answer " + json.dumps(answer), flush=True)
"""


def probe_in_process(
    row: VendorSpec, *, timeout_s: float = 60.0, environ: Mapping[str, str] | None = None
) -> Probe:
    """Whether the plug-in imports and sees a device, asked in a process that ends afterwards.

    Takes the seconds that importing torch and the plug-in takes.

    Args:
        row: The vendor.
        timeout_s: Longest time in seconds; the process is killed after it.
        environ: Environment of the process; None is this one's.

    """
    env = dict(os.environ if environ is None else environ)
    env["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # only this plug-in shall answer
    command = [sys.executable, "-c", _SCRIPT, row.module or "", row.device]
    try:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return Probe(False, f"{row.title} did not answer within {timeout_s} s")
    lines = [line for line in done.stdout.splitlines() if line.startswith("@answer ")]
    if not lines:
        tail = done.stderr.strip().splitlines()[-1:] or ["nothing on stderr"]
        text = f"asking {row.title} ended with code {done.returncode}: {tail[0]}"
        return Probe(False, text)
    answer = json.loads(lines[-1].removeprefix("@answer "))
    if "error" in answer:
        piece = missing_piece(row, answer["error"])
        advice = f"{piece[0]} is missing: {piece[1]}" if piece else row.install_hint
        return Probe(False, f"{answer['stage']} failed: {answer['error']}; {advice}")
    count = answer["count"]
    if count < 1:
        return Probe(False, f"{row.title}'s runtime is here but sees no {row.device} device")
    return Probe(True, f"{row.title} sees {count} {row.device} device{'' if count == 1 else 's'}")
