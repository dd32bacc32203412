"""Tokens have the codes they were made from, Megatron's rule picks the same experts, and the counts
follow the distribution that the name says."""

from __future__ import annotations

import pytest
import torch

from vqmoe_megatron.bench.cases import LayerCase
from vqmoe_megatron.bench.shared_inputs import codes_of_tokens, routed_tokens
from vqmoe_megatron.vq.search import nearest_code


@pytest.mark.parametrize("routing", ["balanced", "zipf", "one-hot"])
@pytest.mark.parametrize(("num_experts", "hidden"), [(4, 32), (64, 64), (256, 256), (300, 256)])
def test_codes_and_router_agree_on_every_token(routing: str, num_experts: int, hidden: int) -> None:
    case = LayerCase(num_experts, 2 * num_experts + 1, 200, hidden, 16, routing)
    tokens = routed_tokens(case)
    assert torch.equal(nearest_code(tokens.x, tokens.codes), tokens.code_ids)
    experts = (tokens.x @ tokens.router_weight.t()).argmax(dim=1)
    assert torch.equal(experts, tokens.code_ids % num_experts)


def counts(routing: str, num_codes: int = 10, num_tokens: int = 1003) -> torch.Tensor:
    case = LayerCase(4, num_codes, num_tokens, 16, 16, routing)
    ids = codes_of_tokens(case, torch.Generator().manual_seed(1))
    assert ids.shape == (num_tokens,)
    return torch.bincount(ids, minlength=num_codes)


def test_balanced_counts_differ_by_at_most_one() -> None:
    assert sorted(set(counts("balanced").tolist())) == [100, 101]


def test_zipf_counts_fall_as_one_over_the_rank() -> None:
    found = counts("zipf").sort(descending=True).values
    shares = 1.0 / torch.arange(1, 11)
    assert (found - 1003 * shares / shares.sum()).abs().max() <= 1.0


def test_one_hot_is_one_code() -> None:
    assert counts("one-hot").tolist() == [1003] + [0] * 9


def test_ranks_share_the_codes_and_have_their_own_tokens() -> None:
    case = LayerCase(4, 8, 50, 16, 16, "zipf")
    first, again, second = routed_tokens(case), routed_tokens(case), routed_tokens(case, 1)
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.router_weight, second.router_weight)
    assert not torch.equal(first.x, second.x)
