"""Initial code vectors: uniform, chosen from data, or k-means of data; and random projections.

M sample tokens, C code slices, K codes per slice, D slice width. Everything here is deterministic
in ``seed`` and runs on the CPU in fp32, so that one rank can compute it and broadcast the result.
"""

from __future__ import annotations

import torch

from vqmoe_megatron.vq.search import nearest_code

KMEANS_ITERATIONS = 10  # Lloyd rounds; the codebook keeps learning afterwards
DUPLICATE_JITTER = 1e-2  # relative noise on repeated sample tokens, so that no two codes are equal


def uniform_codes(num_slices: int, num_codes: int, width: int, seed: int) -> torch.Tensor:
    """Draw fp32 ``[C, K, D]`` codes from U(-1, 1), the scale of one normalised hidden element."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_slices, num_codes, width, generator=generator).mul_(2.0).sub_(1.0)


def orthonormal_rows(num_rows: int, width: int, seed: int) -> torch.Tensor:
    """Draw fp32 ``[num_rows, width]`` with orthonormal rows, uniformly among those."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(width, num_rows, generator=generator, dtype=torch.float64)
    orthonormal, triangle = torch.linalg.qr(drawn)
    return (orthonormal * triangle.diagonal().sign()).t().float().contiguous()


def data_codes(sample: torch.Tensor, num_codes: int, seed: int) -> torch.Tensor:
    """Choose ``num_codes`` sample tokens per slice, without replacement while they last.

    Args:
        sample: fp32 ``[M, C, D]``.
        num_codes: K.
        seed: of the choice; the same seed and sample give the same codes on every rank.

    Returns:
        fp32 ``[C, K, D]``. When M < K, repeats get a small jitter.

    Raises:
        ValueError: for an empty sample.
    """
    num_tokens, num_slices, _ = sample.shape
    if num_tokens == 0:
        raise ValueError("cannot initialise a codebook from an empty sample of tokens")
    generator = torch.Generator().manual_seed(seed)
    slices = []
    for c in range(num_slices):
        order = torch.randperm(num_tokens, generator=generator)
        chosen = sample[order[torch.arange(num_codes) % num_tokens], c].clone()
        repeated = torch.arange(num_codes) >= num_tokens
        noise = torch.randn(chosen.shape, generator=generator) * sample[:, c].std(correction=0)
        slices.append(chosen + DUPLICATE_JITTER * repeated.unsqueeze(1) * noise)
    return torch.stack(slices)


def kmeans_codes(sample: torch.Tensor, num_codes: int, seed: int) -> torch.Tensor:
    """Lloyd's k-means from :func:`data_codes`; an empty cluster keeps its centre.

    Args and result as :func:`data_codes`.
    """
    codes = data_codes(sample, num_codes, seed)
    for c in range(codes.shape[0]):
        points = sample[:, c]
        for _ in range(KMEANS_ITERATIONS):
            ids = nearest_code(points, codes[c])
            count = torch.bincount(ids, minlength=num_codes).unsqueeze(1)
            total = torch.zeros_like(codes[c]).index_add_(0, ids, points)
            codes[c] = torch.where(count > 0, total / count.clamp(min=1), codes[c])
    return codes
