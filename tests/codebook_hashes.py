"""Digests of codebooks and streams of codes, to compare replicas, runs and steps bit by bit."""

from __future__ import annotations

import hashlib


def codebook_hashes(model) -> dict[str, str]:
    """sha256 of every codebook and threshold, by global layer number, that of a memory by
    ``1.memory``; a baseline has none."""
    from vqmoe_megatron.moe.layer import VQMoELayer

    hashes = {}
    for layer in (m for chunk in model for m in chunk.modules() if isinstance(m, VQMoELayer)):
        number = str(layer.layer_number)
        if hasattr(layer, "assigner"):
            tau = [layer.threshold.tau] if layer.vq.threshold_routing else []
            hashes[number] = _digest([*_of_assigner(layer.assigner), *tau])
        if hasattr(layer, "memory_assigner"):
            hashes[f"{number}.memory"] = _digest(_of_assigner(layer.memory_assigner))
    return hashes


def _of_assigner(assigner) -> list:
    codebook = assigner.codebook
    sums = [codebook.ema_sum] if codebook.keeps_sums else []
    tensors = [codebook.codes.data, codebook.usage, *sums, codebook.num_steps]
    return [*tensors, assigner.code_map.expert_of_row]


def _digest(tensors) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def stream_hashes(model) -> dict[str, str]:
    """sha256 of every table of the model's stream of codes that all its chunks have, by name; {}
    without a code memory.

    Raises:
        ValueError: where chunks differ.
    """
    from vqmoe_megatron.moe.memory.code_stream import CodeStream

    streams = [m for chunk in model for m in chunk.modules() if isinstance(m, CodeStream)]
    found: dict[str, str] = {}
    for stream in streams:
        for name in ("code_of_token", "context_table", "context_codes", "num_steps"):
            if hasattr(stream, name):
                tensor = getattr(stream, name).cpu().contiguous()
                digest = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
                if found.setdefault(name, digest) != digest:
                    raise ValueError(f"chunks have different {name}")
    return found
