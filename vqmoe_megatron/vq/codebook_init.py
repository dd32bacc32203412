"""Initial code vectors: uniform, chosen from data, or k-means of data; and random projections.

M sample tokens, C code slices, K codes per slice, D slice width. Everything here is deterministic
in ``seed`` and runs on the CPU in fp32, so that one rank can compute it and broadcast the result.
"""

from __future__ import annotations

import warnings

import torch

from vqmoe_megatron.vq.search import nearest_code

KMEANS_ITERATIONS = 10  # Lloyd rounds; the codebook keeps learning afterwards
DUPLICATE_JITTER = 1e-2  # relative noise on repeated sample tokens, so that no two codes are equal
SAME_VECTOR = 1e-4  # of the tokens' spread: nearer ones are one vector that was rounded differently
NUM_DIRECTIONS = 16  # random ones, in which vectors are compared
EXACT = "donot_use_mm_for_euclid_dist"  # torch.cdist by differences, not by a product


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
    """Choose ``num_codes`` different sample tokens per slice, while they last.

    Text repeats itself: tokens of a run of blanks have the same vector but for rounding. As two
    codes they would leave it to rounding, which differs between layouts, which code, and so which
    expert, such a token takes.

    Args:
        sample: fp32 ``[M, C, D]``.
        num_codes: K.
        seed: of the choice; the same seed and sample give the same codes on every rank.

    Returns:
        fp32 ``[C, K, D]``. With fewer different tokens than K, repeats get a small jitter, and a
        warning says so.

    Raises:
        ValueError: for an empty sample.
    """
    num_tokens, num_slices, _ = sample.shape
    if num_tokens == 0:
        raise ValueError("cannot initialise a codebook from an empty sample of tokens")
    generator = torch.Generator().manual_seed(seed)
    slices = []
    fewest = num_codes
    for c in range(num_slices):
        points = sample[:, c]
        order = torch.randperm(num_tokens, generator=generator)
        rows = different_rows(points, order, num_codes)
        fewest = min(fewest, len(rows))
        chosen = points[rows[torch.arange(num_codes) % len(rows)]].clone()
        repeated = torch.arange(num_codes) >= len(rows)
        noise = torch.randn(chosen.shape, generator=generator) * points.std(correction=0)
        slices.append(chosen + DUPLICATE_JITTER * repeated.unsqueeze(1) * noise)
    if fewest < num_codes:
        warnings.warn(
            f"{num_codes} codes start from {num_tokens} vectors of which {fewest} differ"
            f"{' in the slice with the fewest' if num_slices > 1 else ''}: the other "
            f"{num_codes - fewest} start as copies of these, moved a little; fewer codes, or more "
            "tokens in a microbatch, may give each its own",
            stacklevel=2,
        )
    return torch.stack(slices)


def different_rows(points: torch.Tensor, order: torch.Tensor, at_most: int) -> torch.Tensor:
    """The first rows of ``points`` in ``order`` that are not the same vector as one before them.

    Args:
        points: fp32 ``[M, D]``.
        order: int64 ``[M]``, rows of ``points`` in the order in which they are looked at.
        at_most: how many to return; the search ends there.

    Returns:
        int64 ``[at_most]``, or fewer, at least one, where no more rows differ.
    """
    centred = (points - points.mean(dim=0))[order]
    seen = centred @ _directions(points.shape[1])
    near = SAME_VECTOR * centred.square().sum(dim=1).mean().sqrt()
    found = order[:0]
    for first in range(0, len(order), at_most):
        last = min(first + at_most, len(order))
        distance = torch.cdist(seen[first:last], seen[:last], compute_mode=EXACT)
        is_before = torch.ones_like(distance, dtype=torch.bool).tril(first - 1)
        is_repeat = ((distance <= near) & is_before).any(dim=1)
        found = torch.cat([found, order[first:last][~is_repeat]])
        if len(found) >= at_most:
            break
    return found[:at_most]


def _directions(width: int) -> torch.Tensor:
    """fp32 ``[D, min(D, 16)]``: distances of vectors times this are theirs, more or less."""
    if width <= NUM_DIRECTIONS:
        return torch.eye(width)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(width, NUM_DIRECTIONS, generator=generator) / NUM_DIRECTIONS**0.5


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
