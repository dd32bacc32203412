"""Nearest-code search: which code of the codebook is closest to each token.

T tokens, H hidden size, C code slices, K codes per slice, D = H / C slice width.

argmin_k |x - v_k|^2 = argmin_k (|v_k|^2 - 2 <x, v_k>); the token's own norm does not matter. Both
sides are first shifted by the most central code: representations share a large common part, which
would eat the digits that tell close codes apart; shifting by a code, not by the mean, keeps exact
ties exact. The product is taken tile by tile, so no more than a tile of the [T, K] distances ever
exists. On CUDA Triton kernels do the same without any: on tensor cores, and in fp32 for what these
cannot decide (split_search_triton.py) or for narrow slices (search_triton.py), with the same ids.
"""

from __future__ import annotations

import torch

from vqmoe_megatron.vq.kernel_choice import use_kernel
from vqmoe_megatron.vq.split_search import MIN_WIDTH

TILE_CODES = 256
TILE_DISTANCES = 1 << 17  # 512 KiB of fp32 distances: read back from a core's own cache
MAX_TILE_TOKENS = 1 << 12
CUDA_TILE_TOKENS, CUDA_TILE_CODES = 1 << 14, 1 << 12  # few launches where the kernel cannot run


def nearest_code(x: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Return the index of the nearest code of every token; ties go to the lowest index.

    Args:
        x: ``[T, H]``, any floating dtype; distances are taken in fp32 (fp64 for fp64 inputs).
        codebook: ``[K, H]`` for one code per token, or ``[C, K, H / C]`` for product codes.

    Returns:
        int64 ``[T]`` for a ``[K, H]`` codebook, int64 ``[T, C]`` for ``[C, K, H / C]``.

    Raises:
        ValueError: when the shapes do not fit each other.

    No communication, no gradient, no host synchronisation.
    """
    if codebook.dim() == 2:
        return nearest_code(x, codebook.unsqueeze(0)).squeeze(1)
    if x.dim() != 2 or codebook.dim() != 3 or codebook.shape[0] * codebook.shape[2] != x.shape[1]:
        raise ValueError(
            f"x {list(x.shape)} and codebook {list(codebook.shape)} do not fit: need x [T, H] and "
            "codebook [K, H] or [C, K, H / C]"
        )
    if use_kernel(x, codebook):
        if codebook.shape[2] >= MIN_WIDTH:
            from vqmoe_megatron.vq.split_search_triton import nearest_code_split

            return nearest_code_split(x, codebook)
        from vqmoe_megatron.vq.search_triton import nearest_code_triton

        return nearest_code_triton(x, codebook)
    slices = zip(x.split(codebook.shape[2], dim=1), codebook.unbind(), strict=True)
    with torch.no_grad():
        ids = [_nearest_in_slice(part, codes) for part, codes in slices]
    return torch.stack(ids, dim=1) if len(ids) > 1 else ids[0].unsqueeze(1)


def _nearest_in_slice(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """x [T, D], codes [K, D] -> int64 [T]. Lower code tiles win ties because later ones need <."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    codes = codes.to(dtype)
    nearest_to_mean = (codes - codes.mean(dim=0)).square().sum(dim=1).argmin()
    centre = codes.index_select(0, nearest_to_mean.unsqueeze(0))  # [1, D]
    codes = codes - centre
    half_norms = codes.square().sum(dim=1).mul_(0.5).unsqueeze(0)  # [1, K]
    tile_tokens, tile_codes = _tile_sizes(x, codes.shape[0])
    tiles = [
        (norms, part.t())
        for norms, part in zip(
            half_norms.split(tile_codes, dim=1), codes.split(tile_codes), strict=True
        )
    ]
    found = codes.new_empty(x.shape[0], dtype=torch.int64)
    shifted = codes.new_empty(min(tile_tokens, x.shape[0]), x.shape[1])
    for rows, found_rows in zip(x.split(tile_tokens), found.split(tile_tokens), strict=True):
        rows = torch.sub(rows, centre, out=shifted[: rows.shape[0]])  # in fp32 also of bf16
        if len(tiles) == 1:
            torch.argmin(_distances(rows, *tiles[0]), dim=1, out=found_rows)
            continue
        best, best_ids = _distances(rows, *tiles[0]).min(dim=1)
        for number, tile in enumerate(tiles[1:], start=1):
            values, indices = _distances(rows, *tile).min(dim=1)
            closer = values < best
            best = torch.where(closer, values, best)
            best_ids = torch.where(closer, indices + number * tile_codes, best_ids)
        found_rows.copy_(best_ids)
    return found


def _tile_sizes(x: torch.Tensor, num_codes: int) -> tuple[int, int]:
    """Tokens and codes of one tile: the fewer codes there are, the more tokens."""
    if x.is_cuda:
        return CUDA_TILE_TOKENS, CUDA_TILE_CODES
    return min(MAX_TILE_TOKENS, TILE_DISTANCES // min(num_codes, TILE_CODES)), TILE_CODES


def _distances(rows: torch.Tensor, half_norms: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """rows [T, D], half_norms [1, K], codes [D, K] -> |v|^2 / 2 - <x, v>, [T, K]."""
    return torch.addmm(half_norms, rows, codes, alpha=-1.0)
