"""DeepSpeed as the engine: ZeRO 0 to 2 over data and expert parallelism."""

import os

import torch

# DeepSpeed looks for its accelerator once, at its import, and warns where a CPU is a surprise.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
