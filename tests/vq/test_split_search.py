"""What bf16 products claim to know about the nearest code is true, however hard the codes are.

The search on tensor cores rests on one claim: a decided code is the nearest one. Here that claim
meets fp64, in every space that quantizers search in, and an adder that cuts off as much as the
bound allows for.
"""

from __future__ import annotations

import pytest
import torch

from vqmoe_megatron.gpu_proof.search_cases import CASES, exact_distances
from vqmoe_megatron.vq.quantizers.cosine import Cosine
from vqmoe_megatron.vq.search import nearest_code
from vqmoe_megatron.vq.split_search import (
    BLOCK_D,
    nearest_if_certain,
    split_codes,
    takes_whole,
    width_of_bounds,
)

DTYPES = [torch.bfloat16, torch.float32, torch.float16]


def check_claims(x: torch.Tensor, codes: torch.Tensor) -> tuple[float, int]:
    """Hold decided codes against fp64; x [T, C * D], codes [C, K, D].

    Returns the undecided share, and how many ids of decided-or-fp32 differ from fp64's where those
    of fp32 do not.
    """
    ids, certain = nearest_if_certain(x, codes)
    of_fp32 = nearest_code(x, codes)
    num_worse = 0
    for c, rows in enumerate(x.split(codes.shape[2], dim=1)):
        distances = exact_distances(rows, codes[c])
        least, nearest = distances.min(dim=1)
        others = distances.scatter(1, nearest.unsqueeze(1), torch.inf).amin(dim=1)
        decided = certain[:, c]
        assert torch.equal(ids[decided, c], nearest[decided])
        assert (others > least)[decided].all()
        # Of equally near codes fp64 may name any: compare distances, not ids.
        answer = torch.where(decided, ids[:, c], of_fp32[:, c])
        is_nearest = distances.gather(1, answer.unsqueeze(1))[:, 0] <= least
        fp32_is_nearest = distances.gather(1, of_fp32[:, c : c + 1])[:, 0] <= least
        num_worse += int((fp32_is_nearest & ~is_nearest).sum())
    return float((~certain).float().mean()), num_worse


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_decided_codes_are_the_nearest(case: str, dtype: torch.dtype) -> None:
    if case == "huge" and dtype == torch.float16:
        pytest.skip("out of the range of fp16")
    x, codes = CASES[case](1500, 96, 200, torch.Generator().manual_seed(1))
    undecided, num_worse = check_claims(x.to(dtype), codes.unsqueeze(0))
    assert num_worse == 0
    if case in ("gaussian", "clusters", "outlier", "huge"):
        assert undecided < 0.03  # else it would be no fast path
    if case in ("duplicates", "one ulp") or case == "tiny":
        assert undecided > 0.3  # what cannot be told apart is not claimed


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("space", ["cosine", "product", "low_dim", "residual"])
def test_in_the_spaces_of_quantizers(space: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    x, codes = CASES["clusters"](1500, 80, 256, generator)
    x = x.to(dtype)
    if space == "cosine":
        x = Cosine.into_space(x, {})
        codes = torch.nn.functional.normalize(codes, dim=1).unsqueeze(0) * 16
    elif space == "product":
        codes = codes.view(80, 4, 64).transpose(0, 1).contiguous()
    elif space == "low_dim":
        projection = torch.linalg.qr(torch.randn(256, 64, generator=generator)).Q
        x, codes = x.float() @ projection, (codes @ projection).unsqueeze(0)
    else:  # the second level sees what the first one left
        first = nearest_code(x, codes)
        x = x.float() - codes[first]
        codes = 0.7 * torch.randn(1, 80, 256, generator=generator)
    undecided, num_worse = check_claims(x, codes)
    assert num_worse == 0
    assert undecided < 0.03


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_hundred_million_pairs(dtype: torch.dtype) -> None:
    generator, num_pairs = torch.Generator().manual_seed(3), 0
    for case in CASES:
        for width in (64, 256):
            for _ in range(2):
                x, codes = CASES[case](6000, 448, width, generator)
                _, num_worse = check_claims(x.to(dtype), codes.unsqueeze(0))
                assert num_worse == 0, (case, width)
                num_pairs += len(x) * len(codes)
    assert num_pairs >= 10**8 // len(DTYPES[:2])


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("case", ["gaussian", "common part", "uneven columns"])
def test_bounds_enclose_the_distance_where_sums_are_cut_off(case: str, dtype: torch.dtype) -> None:
    x, codes = CASES[case](40, 24, 200, torch.Generator().manual_seed(4))
    x, whole = x.to(dtype), takes_whole(dtype)
    split = split_codes(codes.unsqueeze(0), whole)
    rows = x.float() - (0 if whole else split.centre[0])
    first = rows.bfloat16().float()
    second = (rows - first).bfloat16().float()
    high, low = split.high[0].float(), split.low[0].float()
    pairs = (
        [(first, low), (first, high)] if whole else [(second, high), (first, low), (first, high)]
    )
    products = torch.zeros(len(x), len(codes))
    for start in range(0, rows.shape[1], BLOCK_D):
        part = torch.zeros(len(x), len(codes), dtype=torch.float64)
        for of_tokens, of_codes in pairs:
            for step in range(start, min(start + BLOCK_D, rows.shape[1]), 16):
                end = min(step + 16, start + BLOCK_D, rows.shape[1])
                part = cut_off_sum(part, of_tokens[:, step:end], of_codes[:, step:end])
        products += part.float()
    norms = rows.norm(dim=1)
    lower = split.lower_bias[0] - products - norms.unsqueeze(1) * split.slope[0]
    width = torch.stack(
        [width_of_bounds(split, 0, torch.full((len(x),), k), norms) for k in range(len(codes))], 1
    )
    centre = split.centre[0].double()
    shifted = codes.double() - centre
    exact = shifted.square().sum(1) / 2 - (x.double() - centre) @ shifted.t()
    assert (lower.double() <= exact).all()
    assert (lower.double() + width.double() >= exact).all()


def cut_off_sum(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """total [T, K] + a [T, d] @ b [K, d].t() as a tensor core of 24 bits adds: every term aligned
    to the largest, what hangs over cut off, the sum cut off to 24 bits."""
    terms = torch.cat([total.unsqueeze(2), a.double()[:, None] * b.double()[None]], dim=2)
    largest = terms.abs().amax(dim=2, keepdim=True).clamp(min=1e-300)
    unit = torch.exp2(torch.floor(torch.log2(largest)) - 23)
    added = (torch.trunc(terms / unit) * unit).sum(dim=2)
    unit = torch.exp2(torch.floor(torch.log2(added.abs().clamp(min=1e-300))) - 23)
    return torch.trunc(added / unit) * unit


def test_a_claim_too_bold_is_caught() -> None:
    # Without the bounds' width, ids of bf16 products alone are wrong: the tests above can fail.
    x, codes = CASES["midway"](3000, 96, 200, torch.Generator().manual_seed(5))
    split = split_codes(codes.unsqueeze(0), whole_tokens=False)
    approximate = split.half_norms[0] - x.bfloat16().float() @ split.high[0].float().t()
    wrong = approximate.argmin(dim=1) != exact_distances(x, codes).argmin(dim=1)
    assert wrong.float().mean() > 0.05
