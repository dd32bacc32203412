"""The kernels on tensor cores: their claims are the reference's, their ids the fp32 kernel's.

What both search kernels must find is in test_search_triton.py.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch
from fast_tier import spread, tiered
from kernel_places import PLACES, run_kernel, skip_unless_possible

from vqmoe_megatron.gpu_proof.search_cases import CASES
from vqmoe_megatron.vq.split_search import (
    SplitCodes,
    nearest_if_certain,
    split_codes,
    takes_whole,
)

everywhere = pytest.mark.parametrize("place", PLACES)
DTYPES = [torch.bfloat16, torch.float32, torch.float16]
# the interpreter takes seconds for each: of fp16 those that the fast tier runs
IDS_CASES = [*itertools.product(CASES, DTYPES[:2]), *spread(list(CASES)[2::3], DTYPES[2:])]


def first_pass(x: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Ids, lists and counts of ``decide``; runs where the kernels do."""
    from vqmoe_megatron.vq.split_search_triton import decide

    return decide(x, split_codes(codes.float(), takes_whole(x.dtype)))


@everywhere
@pytest.mark.parametrize(("case", "dtype"), tiered(IDS_CASES, spread(CASES, DTYPES)))
def test_ids_are_those_of_the_fp32_kernel(place: str, case: str, dtype: torch.dtype) -> None:
    skip_unless_possible(place)
    from vqmoe_megatron.vq.search_triton import nearest_code_triton
    from vqmoe_megatron.vq.split_search_triton import nearest_code_split

    if case == "huge" and dtype == torch.float16:
        pytest.skip("out of the range of fp16")
    x, codes = CASES[case](90, 150, 136, torch.Generator().manual_seed(1))
    found = run_kernel(place, nearest_code_split, x.to(dtype), codes)
    assert torch.equal(found, run_kernel(place, nearest_code_triton, x.to(dtype), codes))


@everywhere
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("num_tokens", [3, 300])  # few tokens share out the codes among programs
def test_the_first_pass_claims_what_the_reference_claims(
    place: str, num_tokens: int, dtype: torch.dtype
) -> None:
    skip_unless_possible(place)
    from vqmoe_megatron.vq.search_triton import UNDECIDED

    generator = torch.Generator().manual_seed(2)
    parts = [CASES[case](num_tokens, 70, 72, generator) for case in ("midway", "clusters")]
    x = torch.cat([tokens for tokens, _ in parts], dim=1).to(dtype)
    codes = torch.stack([of_slice for _, of_slice in parts])
    found, lists, counts = run_kernel(place, first_pass, x, codes)
    ids, certain = nearest_if_certain(x, codes)
    decided = found != UNDECIDED
    assert (decided != certain).float().mean() < 0.01  # norms are rounded in another order
    both = decided & certain
    assert both.any() and torch.equal(found[both], ids[both])
    for c in range(2):
        listed = lists[c, : counts[c]]
        assert listed.sort().values.tolist() == torch.nonzero(~decided[:, c]).flatten().tolist()
    assert counts[0] > counts[1] or num_tokens < 10  # tokens midway between codes are hard


@everywhere
@pytest.mark.parametrize("whole", [True, False])
def test_codes_are_cut_as_in_torch(place: str, whole: bool) -> None:
    skip_unless_possible(place)
    from vqmoe_megatron.vq.codes_triton import split_codes_triton

    generator = torch.Generator().manual_seed(3)
    codes = torch.stack([CASES[case](1, 40, 300, generator)[1] for case in CASES])
    wanted = split_codes(codes, whole)
    found = SplitCodes(*run_kernel(place, as_tuple, split_codes_triton, codes, whole))
    for name in ("centre", "shifted", "high", "low"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    for name in ("half_norms", "lower_bias", "slope", "offset"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-5, atol=0.0)


def as_tuple(cut: Callable, codes: torch.Tensor, whole: bool) -> tuple[torch.Tensor, ...]:
    split = cut(codes, whole)
    return tuple(getattr(split, field.name) for field in dataclasses.fields(SplitCodes))


@everywhere
def test_codes_too_long_for_fp32_are_infinitely_far_in_both_kernels(place: str) -> None:
    skip_unless_possible(place)
    from vqmoe_megatron.vq.search_triton import nearest_code_triton
    from vqmoe_megatron.vq.split_search_triton import nearest_code_split

    unit = torch.zeros(64)
    unit[0] = 1.0
    codes = torch.stack([-1.3e19 * unit, 1.4e19 * unit])
    x = (1.2e19 * unit)[None].bfloat16()
    found = run_kernel(place, nearest_code_split, x, codes)
    assert torch.equal(found, run_kernel(place, nearest_code_triton, x, codes))
    codes = 5e18 * torch.randn(20, 80, generator=torch.Generator().manual_seed(6))
    x = torch.randn(20, 80).bfloat16()
    found = run_kernel(place, nearest_code_split, x, codes)
    assert torch.equal(found, run_kernel(place, nearest_code_triton, x, codes))
