"""Buffers of a codebook and of what assigns tokens to it, fp32 and int64 also in bf16 training."""

from __future__ import annotations

from vqmoe_megatron.plan.shape import LayerShape

NUM_PROBES = 256  # of vq/codebook.py: tokens kept to measure how many change their code
MAX_CANDIDATES = 4096  # tokens per step and codebook that may replace dead codes
ID_BYTES = 8


def assigner_bytes(layer: LayerShape) -> int:
    """Of a codebook with its losses [3] and code map, after its first step."""
    num_bytes = 3 * 4 + layer.num_code_rows * ID_BYTES
    return num_bytes + codebook_bytes(layer, min(layer.vq.num_codes, MAX_CANDIDATES))


def codebook_bytes(layer: LayerShape, num_candidates: int) -> int:
    """Usage, moving sums, the step's counts and sums, projection, probes; not the codes."""
    rows, width = layer.num_code_rows, layer.code_width
    num_bytes = 3 * rows * 4 + 1 + ID_BYTES  # usage, recent usage, step counts; initialised; steps
    if layer.vq.codebook_update == "ema":
        num_bytes += 2 * rows * width * 4  # moving sums, the step's sums
    elif layer.vq.freeze_after_steps is not None:
        num_bytes += rows * width * 4 + 1  # trained codes as they have to stay; whether
    if layer.vq.code_dim is not None and not layer.vq.train_projection:
        num_bytes += layer.vq.code_dim * layer.hidden_size * 4  # projection
    num_probes = min(NUM_PROBES, num_candidates)
    slices = layer.vq.num_code_slices
    return num_bytes + num_probes * slices * (width * 4 + ID_BYTES)
