"""The judge of searches: what is clearly nearest must be found, near ties are measured."""

from __future__ import annotations

import pytest
import torch

from vqmoe_megatron.gpu_proof.kernel_arms import SEARCH_ARMS, search_agreement
from vqmoe_megatron.vq.search import nearest_code


def drawn(num_tokens: int = 50, num_codes: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randn(num_codes, 16, generator=generator)
    return torch.randn(num_tokens, 16, generator=generator), codes


@pytest.mark.parametrize("name", [name for name, arm in SEARCH_ARMS.items() if not arm.is_kernel])
def test_torch_s_arms_find_the_nearest_codes(name: str) -> None:
    found = search_agreement(SEARCH_ARMS[name].run, *drawn())
    assert (found.num_wrong, found.share_equal) == (0, 1.0)
    assert found.worst_excess == 0.0


def test_the_second_nearest_code_is_wrong() -> None:
    def second(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        return torch.cdist(x, codes).topk(2, largest=False).indices[:, 1]

    found = search_agreement(second, *drawn())
    assert found.num_wrong == 50
    assert found.share_equal == 0.0
    assert found.worst_excess > 1e-3


def test_one_wrong_id_is_seen() -> None:
    x, codes = drawn()

    def almost(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        ids = nearest_code(x, codes)
        ids[7] = (ids[7] + 1) % len(codes)
        return ids

    assert search_agreement(almost, x, codes).num_wrong == 1


def test_either_of_two_equal_codes_is_right() -> None:
    x, codes = drawn(num_codes=4)
    twice = torch.cat([codes, codes])
    found = search_agreement(lambda x, codes: nearest_code(x, codes) + 4, x, twice)
    assert (found.num_wrong, found.worst_excess) == (0, 0.0)


def test_a_single_code_is_everybody_s() -> None:
    x, codes = drawn(num_codes=1)
    assert search_agreement(nearest_code, x, codes).num_wrong == 0
