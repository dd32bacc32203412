"""The folder of simulated steps on the path, for ``counted_ranks``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "simulate"))
