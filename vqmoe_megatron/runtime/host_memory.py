"""Hand memory that the C library keeps for itself back to the system; or let it keep all.

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


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
INT_MAX = 2**31 - 1


def keep_free_memory() -> bool:
    """Let the C library keep all it was given, as CUDA's caching allocator does; tell if it does.

    By default it returns every block above 32 MiB and asks for it anew, and touching the new pages
    of a 64 MiB gradient takes longer than computing it. For benchmarks; a long run would grow.
    """
    name = ctypes.util.find_library("c")
    mallopt = getattr(ctypes.CDLL(name), "mallopt", None) if name else None
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, INT_MAX))
