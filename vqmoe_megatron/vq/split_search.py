"""Which code is nearest, by bf16 products: enclosures of every distance that prove it, or do not.

T tokens, C code slices, K codes per slice, D slice width; u = 2^-24, the unit roundoff of fp32.

Tensor cores multiply bf16 at ten times the rate of fp32, but bf16 has 8 bits. So codes are cut into
parts: ``v_k - centre = high_k + low_k + rest_k`` with bf16 ``high`` and ``low``. What orders the
codes of a token x is, up to a number of its own,

    whole tokens (bf16 ones)   S_k = |v_k - c|^2 / 2 + <c, v_k - c> - <x, v_k - c>        2 products
    cut tokens (all others)    S_k = |v_k - c|^2 / 2 - <x - c, v_k - c>                   3 products

of which the products give ``<x, high + low>``, or ``<x1, high> + <x1, low> + <x2, high>`` with
``x1 + x2`` the first two parts of ``x - c``. How far off they are, and how far off the fp32 kernel
(search_triton.py) is from the same S_k, is bounded by ``|x| slope_k + offset_k``:

    left out     <x, rest>; cut tokens also <x2, low + rest> and the third part of x, 2^-16 |x||v|
    summed       tensor cores keep at least 24 bits of each term, relative to the largest of one
                 step and the running sum, and cut the rest off (Fasi, Higham, Mikaitis, Pranesh
                 2021, "Numerical behavior of NVIDIA tensor cores"). 16 columns are one step or
                 two of 8: at most 18 terms, 18 * 2^-23, for the steps of one BLOCK_D; blocks are
                 then added in fp32, u each
    fp32 kernel  chains of BLOCK_D multiply-adds, then one addition a block: (64 + D / 64) u |x||v|
    rounding     of v - c, x - c, the norms and the final differences: a few u

Then code b is nearest **and** what the fp32 kernel answers, when its upper bound lies under every
other code's lower bound. Other tokens are uncertain, and are searched in fp32. The ids are
therefore those of the fp32 kernel, bit for bit, whatever the block sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch

BLOCK_D = 64  # columns summed before their sum is added to the others
MIN_WIDTH = BLOCK_D  # narrower slices cost little in fp32
UNDERFLOW = 2.0**-100  # products under it lose their digits
_U = 2.0**-24
_STEP = 18 * 2.0**-23  # of 16 columns: their products and two running sums, each cut off
_STEP_COLUMNS = 16
_SLACK = 1.01  # for the second-order terms, and for norms that are themselves rounded


@dataclass(frozen=True)
class SplitCodes:
    """Codes in parts, and what bounds the error of products with them; C, K, D as above."""

    centre: torch.Tensor  # fp32 [C, 1, D], the most central code
    shifted: torch.Tensor  # fp32 [C, K, D], codes minus it
    high: torch.Tensor  # bf16 [C, K, D]
    low: torch.Tensor  # bf16 [C, K, D]
    half_norms: torch.Tensor  # fp32 [C, K], half the squared length of ``shifted``
    lower_bias: torch.Tensor  # fp32 [C, K]: the part of S_k without the token, minus offset
    slope: torch.Tensor  # fp32 [C, K]
    offset: torch.Tensor  # fp32 [C, K]


def takes_whole(dtype: torch.dtype) -> bool:
    """Whether tokens of this dtype need not be cut."""
    return dtype == torch.bfloat16


@dataclass(frozen=True)
class BoundFactors:
    """slope = high |high| + low |low| + rest |rest| + code |v - c|, and
    offset = half_norm |v - c|^2 / 2 + centre |c| |v - c| + bias |what is added to the products|."""

    high: float
    low: float
    rest: float
    code: float
    half_norm: float
    centre: float
    bias: float


def bound_factors(width: int, whole_tokens: bool) -> BoundFactors:
    """The rules above as numbers, for slices of this width."""
    num_blocks = ceil(width / BLOCK_D)
    num_products = 2 if whole_tokens else 3
    steps = _STEP * num_products * (BLOCK_D // _STEP_COLUMNS)
    summed = steps + (num_blocks + 3) * _U  # relative to |x| (|high| + |low|)
    in_fp32 = (BLOCK_D + num_blocks + 4) * _U  # relative to |x - c| |v|, of the fp32 kernel
    second = 0.0 if whole_tokens else 2.0**-8  # of a cut token's second part, relative to |x|
    third = 0.0 if whole_tokens else (1 + 2.0**-7) * 2.0**-16
    return BoundFactors(
        high=_SLACK * (1 + second) * summed,
        low=_SLACK * (summed + second),
        rest=_SLACK * (1 + 2 * second),
        code=_SLACK * (in_fp32 + 2 * _U + third),
        half_norm=_SLACK * 9 * _U,
        centre=_SLACK * (in_fp32 + 3 * _U) if whole_tokens else 0.0,
        bias=_SLACK * 4 * _U,
    )


def split_codes(codes: torch.Tensor, whole_tokens: bool) -> SplitCodes:
    """Cut codes and bound what products with them may be off, by the rules above.

    Args:
        codes: fp32 ``[C, K, D]``.
        whole_tokens: whether tokens are bf16 and not cut.

    No communication, no gradient, no host synchronisation.
    """
    from_mean = (codes - codes.mean(dim=1, keepdim=True)).square_().sum(dim=2)
    most_central = from_mean.argmin(dim=1).view(-1, 1, 1).expand(-1, 1, codes.shape[2])
    centre = codes.gather(1, most_central)
    shifted = codes - centre
    high = shifted.bfloat16()
    rest = shifted - high  # exact, as is the next difference
    low = rest.bfloat16()
    rest -= low
    v, of_high, of_low, of_rest, of_centre = (
        torch.linalg.vector_norm(part, dim=2, dtype=torch.float64)
        for part in (shifted, high, low, rest, centre)
    )
    half_norms = v.square() * 0.5
    bias = half_norms
    if whole_tokens:
        bias = bias + (shifted.double() * centre.double()).sum(dim=2)
    factors = bound_factors(codes.shape[2], whole_tokens)
    slope = factors.high * of_high + factors.low * of_low
    slope += factors.rest * of_rest + factors.code * v
    offset = factors.half_norm * half_norms + factors.centre * of_centre * v
    offset += factors.bias * bias.abs()
    half_norms = half_norms.float()
    # What fp32 cannot hold the fp32 kernel takes for infinitely far away.
    lower_bias = torch.where(half_norms.isinf(), torch.inf, bias - offset)
    numbers = (half_norms, lower_bias, slope, offset)
    return SplitCodes(centre, shifted, high, low, *(number.float() for number in numbers))


def nearest_if_certain(x: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The readable form of the kernels' first pass: nearest codes, and for whom that is proven.

    Args:
        x: ``[T, C * D]``, floating.
        codes: ``[C, K, D]``, floating.

    Returns:
        int64 ``[T, C]`` and bool ``[T, C]``. Makes all ``[T, K]`` bounds of a slice at once.
        No communication, no gradient.
    """
    whole = takes_whole(x.dtype)
    split = split_codes(codes.float(), whole)
    ids, certain = [], []
    for c, rows in enumerate(x.detach().split(codes.shape[2], dim=1)):
        high, low = split.high[c].float(), split.low[c].float()
        if whole:
            rows = rows.float()
            products = _in_blocks(rows, low) + _in_blocks(rows, high)
        else:
            rows = rows.float() - split.centre[c]
            first = rows.bfloat16().float()
            second = (rows - first).bfloat16().float()
            products = _in_blocks(second, high) + _in_blocks(first, low) + _in_blocks(first, high)
        norms = torch.linalg.vector_norm(rows, dim=1)
        lower = split.lower_bias[c] - products - norms.unsqueeze(1) * split.slope[c]
        lower = torch.where(lower.isnan(), torch.inf, lower)
        best, best_ids = lower.min(dim=1)
        others = lower.scatter(1, best_ids.unsqueeze(1), torch.inf).amin(dim=1)
        ids.append(best_ids)
        certain.append(others > best + width_of_bounds(split, c, best_ids, norms))
    return torch.stack(ids, dim=1), torch.stack(certain, dim=1)


def width_of_bounds(
    split: SplitCodes, c: int, ids: torch.Tensor, norms: torch.Tensor
) -> torch.Tensor:
    """Upper minus lower bound of codes ``ids`` [T] of slice ``c`` for tokens of ``norms`` [T]."""
    return 2 * (norms * split.slope[c][ids] + split.offset[c][ids]) + UNDERFLOW


def _in_blocks(rows: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """rows [T, D], codes [K, D] -> [T, K]: one product a block of columns, added in order."""
    blocks = zip(rows.split(BLOCK_D, dim=1), codes.split(BLOCK_D, dim=1), strict=True)
    return sum((part @ of_codes.t() for part, of_codes in blocks), start=torch.zeros(()))
