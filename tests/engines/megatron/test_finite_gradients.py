"""The check of gradients before a step: each NaN and infinity is seen, nothing large is made."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vqmoe_megatron.engines.megatron.step import all_finite


class LargestResult(TorchDispatchMode):
    """Notes the most elements that any operation returned."""

    num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.num_elements = max([self.num_elements, *made])
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_elements", [1, 7, 40_003])  # beside whole vectors and threads
def test_one_bad_element_anywhere_is_seen(dtype, num_elements) -> None:
    values = torch.randn(num_elements, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert all_finite(values)
    for place in {0, num_elements // 2, num_elements - 1}:
        for bad in (math.nan, math.inf, -math.inf):
            damaged = values.clone()
            damaged[place] = bad
            assert not all_finite(damaged), (place, bad)
    both = torch.cat([values, torch.tensor([math.inf, -math.inf, math.nan], dtype=dtype)])
    assert not all_finite(both)


@pytest.mark.parametrize("extreme", [3.4028234e38, 1e-45, 0.0])
def test_extreme_numbers_are_finite(extreme) -> None:
    values = torch.tensor([extreme, -extreme])
    assert all_finite(values) and all_finite(values[:1])


def test_nothing_of_the_size_of_the_gradients_is_made() -> None:
    values = torch.randn(5_000)
    with LargestResult() as seen:
        all_finite(values)
    assert seen.num_elements == 1
    with LargestResult() as seen:
        values.abs().max()
    assert seen.num_elements == 5_000  # what is counted here
