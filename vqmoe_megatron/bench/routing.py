"""Tokens whose codes, and whose experts in Megatron's router, follow a wanted distribution.

T tokens, H hidden size, K codes, N experts.

    code k        v_k = EXPERT_PULL * direction of expert (k mod N) + noise of size 1, fixed
    router row e  ROUTER_SCALE * direction of expert e
    token t       x_t = v_{k_t} + TOKEN_NOISE * noise, with k_t from the routing

A token lies close to its code, so its nearest code is k_t; and the expert whose direction it has
most of is k_t mod N, so Megatron's top-1 is the expert of the code. Every arm then sends every
token to the same expert. A second expert, for top-2, comes from the code's fixed noise.

    balanced  every code gets T / K tokens, up to rounding
    zipf      the code of rank r gets a share 1 / (r + 1) of them (exponent 1); ranks are dealt to
              codes at random
    one-hot   all tokens have code 0
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vqmoe_megatron.bench.cases import LayerCase

EXPERT_PULL = 12.0  # against noise of size 1: the largest of a thousand normal draws is below 4
ROUTER_SCALE = 0.25  # keeps the probabilities of other experts away from zero
TOKEN_NOISE = 0.05


@dataclass(frozen=True)
class RoutedTokens:
    """Tokens and what they were made from."""

    x: torch.Tensor  # [T, H]
    code_ids: torch.Tensor  # int64 [T], the code each token was made from
    codes: torch.Tensor  # fp32 [K, H]
    router_weight: torch.Tensor  # [N, H]


def codes_of_tokens(case: LayerCase, generator: torch.Generator) -> torch.Tensor:
    """Return int64 ``[T]``: counts by largest remainder from the routing's shares, shuffled."""
    num_tokens, num_codes = case.num_tokens, case.num_codes
    if case.routing == "one-hot":
        return torch.zeros(num_tokens, dtype=torch.int64)
    shares = torch.ones(num_codes, dtype=torch.float64)
    if case.routing == "zipf":
        shares = 1.0 / torch.arange(1, num_codes + 1, dtype=torch.float64)
        shares = shares[torch.randperm(num_codes, generator=generator)]
    wanted = shares / shares.sum() * num_tokens
    counts = wanted.floor().to(torch.int64)
    most_missing = (wanted - counts).argsort(descending=True, stable=True)
    counts[most_missing[: num_tokens - int(counts.sum())]] += 1
    ids = torch.arange(num_codes).repeat_interleave(counts)
    return ids[torch.randperm(num_tokens, generator=generator)]


def routed_tokens(case: LayerCase, rank: int = 0) -> RoutedTokens:
    """Draw codes and router, equal for all ranks, and this rank's own tokens, in the case's dtype.

    No communication.
    """
    generator = torch.Generator().manual_seed(case.seed)
    dtype = getattr(torch, case.dtype)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    directions = draw(max(case.num_experts, case.hidden_size), case.hidden_size)
    if case.num_experts <= case.hidden_size:
        directions = torch.linalg.qr(directions)[0]
    directions = torch.nn.functional.normalize(directions[: case.num_experts], dim=1)
    experts = torch.arange(case.num_codes) % case.num_experts
    codes = EXPERT_PULL * directions[experts] + draw(case.num_codes, case.hidden_size)
    generator.manual_seed(case.seed + 1 + rank)
    ids = codes_of_tokens(case, generator)
    x = codes[ids] + TOKEN_NOISE * draw(case.num_tokens, case.hidden_size)
    return RoutedTokens(x.to(dtype), ids, codes, (ROUTER_SCALE * directions).to(dtype))
