"""The search of codes, slow and readable: part of the layer's oracle.

H hidden size, C code slices, K codes per slice, D = H / C slice width, of low_dim, fsq and lfq the
space's own, of residual, whose C codes are added, H.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from vqmoe_megatron.config import VQConfig

PROJECTED = ("low_dim", "fsq", "lfq")


def prepare(
    token: torch.Tensor, parameters: Mapping[str, torch.Tensor], vq: VQConfig
) -> torch.Tensor:
    """The token [H] in the space where distances are taken: of length sqrt(H) for cosine codes,
    projected to [D] for low_dim, fsq and lfq, and for fsq between -1 and 1."""
    if vq.quantizer in PROJECTED:
        ready = _projection(parameters, vq) @ token
        return ready.tanh() if vq.quantizer == "fsq" else ready
    return _scaled(token) if vq.quantizer == "cosine" else token


def lifted(v: torch.Tensor, parameters: Mapping[str, torch.Tensor], vq: VQConfig) -> torch.Tensor:
    """A vector of that space as a hidden vector [H]."""
    return _projection(parameters, vq).detach().t() @ v if vq.quantizer in PROJECTED else v


def _projection(parameters: Mapping[str, torch.Tensor], vq: VQConfig) -> torch.Tensor:
    """[D, H]; of a trained one every row at length one."""
    projection = parameters["assigner.codebook.projection"]
    if not vq.train_projection:
        return projection
    return projection / projection.square().sum(dim=1, keepdim=True).sqrt()


def code_vectors(parameters: Mapping[str, torch.Tensor], vq: VQConfig) -> torch.Tensor:
    """[C, K, D]; cosine codes are compared and used at the length of the tokens, times what was
    learned."""
    codes = parameters["assigner.codebook.codes"]
    vectors = _scaled(codes) if vq.quantizer == "cosine" else codes
    return vectors * parameters["assigner.codebook.scale"] if vq.learn_code_scale else vectors


def _scaled(v: torch.Tensor) -> torch.Tensor:
    length = v.square().sum(dim=-1, keepdim=True).sqrt().clamp(min=1e-12)
    return v / length * v.shape[-1] ** 0.5


def nearest(
    token: torch.Tensor, vectors: torch.Tensor, vq: VQConfig | None = None
) -> tuple[list[int], list[torch.Tensor]]:
    """token [H], vectors [C, K, D] -> its C codes and their C vectors [D]."""
    codes: list[int] = []
    is_summed = vq is not None and vq.quantizer == "residual"
    token, vectors_now = token.detach(), vectors.detach()
    for c, candidates in enumerate(vectors_now):
        if is_summed:
            part = token - sum(vectors_now[d, k] for d, k in enumerate(codes))
        else:
            part = token.chunk(len(vectors))[c]
        distances = (part - candidates).square().sum(dim=1).tolist()
        codes.append(distances.index(min(distances)))
    return codes, [vectors[c, k] for c, k in enumerate(codes)]


def whole(vectors: list[torch.Tensor], vq: VQConfig) -> torch.Tensor:
    """A token's quantised vector of its C codes' [D]."""
    return sum(vectors) if vq.quantizer == "residual" else torch.cat(vectors)


def errors(
    token: torch.Tensor, vectors: list[torch.Tensor], vq: VQConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the commitment and the codebook loss have of one token in the codebook's space: means of
    squares over its elements, for codes that are added the sum of those of every depth."""
    if vq.quantizer != "residual":
        v = torch.cat(vectors)
        return (token - v.detach()).square().mean(), (token.detach() - v).square().mean()
    commitment = codebook = token.new_zeros(())
    for c, v in enumerate(vectors):
        left = token - sum(earlier.detach() for earlier in vectors[:c])
        commitment = commitment + (left - v.detach()).square().mean()
        codebook = codebook + (left.detach() - v).square().mean()
    return commitment, codebook


def entropy_loss(ready: torch.Tensor, usage: torch.Tensor, vq: VQConfig) -> torch.Tensor:
    """lfq's loss of one token [D] in its space, for the codes' shares of tokens [K]: the entropy of
    its bits less what each says against the bit's share."""
    loss = ready.new_zeros(())
    for i, z in enumerate(ready):
        shift = vq.code_dim - 1 - i
        share = float(sum(part for k, part in enumerate(usage) if k >> shift & 1))
        p = 1 / (1 + (-4 * z).exp())
        loss = loss - p * p.log() - (1 - p) * (1 - p).log()
        loss = loss + p * math.log(share) + (1 - p) * math.log(1 - share)
    return vq.entropy_loss_coeff * loss / len(ready)
