"""Hand memory that the C library keeps for itself back to the system.

On the CPU, token counts per expert change with every microbatch, so tensors of ever new sizes leave
holes in glibc's heap: measured 3 MB a step at two ranks, with no tensor leaked. Trimming the heap
every few steps keeps the resident size flat and costs milliseconds.
"""

from __future__ import annotations

import ctypes
import ctypes.util


def release_free_memory() -> bool:
    """Return unused heap pages to the system; False where the C library has no ``malloc_trim``."""
    name = ctypes.util.find_library("c")
    trim = getattr(ctypes.CDLL(name), "malloc_trim", None) if name else None
    if trim is None:
        return False
    trim(0)
    return True
