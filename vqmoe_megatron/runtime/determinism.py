"""Bitwise equal reruns: what has to be asked of torch, cuBLAS, NCCL and Transformer Engine."""

from __future__ import annotations

import os

import torch

# Read by the libraries when they are first used, so they must be set before.
VARIABLES = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # torch's documentation of use_deterministic_algorithms
    "NCCL_ALGO": "Ring",  # tree reductions may choose another order
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",  # Transformer Engine's attention backward
}


def require_determinism() -> None:
    """Let every operation be deterministic or raise. For the whole process; no communication.

    Variables that are already set are respected. On the CPU the same layout gives the same bits
    without it; there it turns the chance into a promise.
    """
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
