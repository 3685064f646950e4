"""Lets tests and doctests import the example modules as the programs do: from this folder."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
