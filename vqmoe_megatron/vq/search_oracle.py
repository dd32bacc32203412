"""The search of codes, slow and readable: part of the layer's oracle.

H hidden size, C code slices, K codes per slice, D = H / C slice width, of low_dim the space's own.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vqmoe_megatron.config import VQConfig


def prepare(
    token: torch.Tensor, parameters: Mapping[str, torch.Tensor], vq: VQConfig
) -> torch.Tensor:
    """The token [H] in the space where distances are taken: of length sqrt(H) for cosine codes,
    projected to [D] for low_dim."""
    if vq.quantizer == "low_dim":
        return parameters["assigner.codebook.projection"] @ token
    return _scaled(token) if vq.quantizer == "cosine" else token


def lifted(v: torch.Tensor, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A vector of that space as a hidden vector [H]."""
    projection = parameters.get("assigner.codebook.projection")
    return v if projection is None else projection.t() @ v


def code_vectors(parameters: Mapping[str, torch.Tensor], vq: VQConfig) -> torch.Tensor:
    """[C, K, D]; cosine codes are compared and used at the length of the tokens."""
    codes = parameters["assigner.codebook.codes"]
    return _scaled(codes) if vq.quantizer == "cosine" else codes


def _scaled(v: torch.Tensor) -> torch.Tensor:
    length = v.square().sum(dim=-1, keepdim=True).sqrt().clamp(min=1e-12)
    return v / length * v.shape[-1] ** 0.5


def nearest(token: torch.Tensor, vectors: torch.Tensor) -> tuple[list[int], list[torch.Tensor]]:
    """token [H], vectors [C, K, D] -> its C codes and their C vectors [D]."""
    codes = []
    for part, candidates in zip(token.detach().chunk(len(vectors)), vectors.detach(), strict=True):
        distances = (part - candidates).square().sum(dim=1).tolist()
        codes.append(distances.index(min(distances)))
    return codes, [vectors[c, k] for c, k in enumerate(codes)]
