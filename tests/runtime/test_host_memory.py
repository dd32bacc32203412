"""Trimming the heap gives pages back without touching live data."""

from __future__ import annotations

import subprocess
import sys

import torch

from vqmoe_megatron.runtime.host_memory import release_free_memory


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_freed_small_blocks_return_to_the_system() -> None:
    # 256 MB in blocks below the mmap threshold; every 50th stays, so the heap cannot just shrink
    blocks = [torch.ones(16_000) for _ in range(4_000)]
    kept = blocks[::50]
    del blocks
    before = resident_bytes()
    assert release_free_memory()
    assert resident_bytes() < before - 100_000_000
    assert all(float(block.sum()) == 16_000 for block in kept)


KEEPING = """
import resource, torch
from vqmoe_megatron.runtime.host_memory import keep_free_memory

def num_page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = torch.ones(16_000_000)  # 64 MB, which glibc would map and unmap each time
    del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

by_default = min(num_page_faults() for _ in range(9))
assert keep_free_memory()
# The first calls grow the heap until it has room in one piece, and a small block that comes to lie
# in that room makes it grow once more: what counts is that a call can do without new pages at all.
print(by_default, min(num_page_faults() for _ in range(16)))
"""


def test_kept_memory_is_not_faulted_in_again() -> None:
    done = subprocess.run([sys.executable, "-c", KEEPING], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    by_default, kept = map(int, done.stdout.split())
    assert kept < 20 < by_default
