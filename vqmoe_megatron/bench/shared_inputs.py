"""What all arms of a case share: tokens with the wanted routing, codes, router, and parameters.

T tokens, H hidden size, F expert hidden size, K codes, N experts; this rank holds n of the experts,
and of them one of E cuts of F.

Tokens have codes, and experts in Megatron's router, that follow a wanted distribution:

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

Parameters are drawn once and put into each arm's own modules. Arms share the tensors themselves, so
that every arm reads the same memory and 256 experts fit many times. A gradient is therefore taken
out of the shared parameter before the next arm runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core import parallel_state

from vqmoe_megatron.bench.cases import LayerCase

EXPERT_PULL = 12.0  # against noise of size 1: the largest of a thousand normal draws is below 4
ROUTER_SCALE = 0.25  # keeps the probabilities of other experts away from zero
TOKEN_NOISE = 0.05

Weights = dict[str, torch.nn.Parameter]  # by the names of VQMoELayer.named_parameters()


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


def draw_weights(case: LayerCase, router_weight: torch.Tensor) -> Weights:
    """Draw this rank's cut of every parameter but the codebook, in the case's dtype.

    Args:
        case: sizes, dtype and seed; equal seeds give all ranks cuts of the same experts.
        router_weight: ``[N, H]``.

    No communication.
    """
    generator = torch.Generator().manual_seed(case.seed + 1_000_003)
    dtype, device = getattr(torch, case.dtype), torch.cuda.current_device()
    hidden, ffn = case.hidden_size, case.ffn_hidden_size

    def draw(*shape: int, scale: float, offset: float = 0.0) -> torch.Tensor:
        return offset + scale * torch.randn(*shape, generator=generator)

    drawn = {
        "experts.weight1": _own_cut(draw(case.num_experts, ffn, hidden, scale=hidden**-0.5), 1),
        "experts.weight2": _own_cut(draw(case.num_experts, hidden, ffn, scale=ffn**-0.5), 2),
        "router.weight": router_weight,
        "gate.linear.weight": draw(2, hidden, scale=0.1 * hidden**-0.5),
        "gate.linear.bias": draw(2, scale=0.5),
    }
    for name in ("input_norm", "output_norm"):
        drawn[f"{name}.weight"] = draw(hidden, scale=0.2, offset=1.0)
        drawn[f"{name}.bias"] = draw(hidden, scale=0.2)
    return {
        name: torch.nn.Parameter(tensor.to(device=device, dtype=dtype).contiguous())
        for name, tensor in drawn.items()
    }


def _own_cut(experts: torch.Tensor, ffn_axis: int) -> torch.Tensor:
    """[N, ...] of all ranks -> [n, ...] of this one, cut along F when experts are sharded."""
    num_ranks = parallel_state.get_expert_model_parallel_world_size()
    num_shards = parallel_state.get_expert_tensor_parallel_world_size()
    own = experts.chunk(num_ranks)[parallel_state.get_expert_model_parallel_rank()]
    shards = own.chunk(num_shards, dim=ffn_axis)
    return shards[parallel_state.get_expert_tensor_parallel_rank()]


def share_weights(module: torch.nn.Module, weights: Weights) -> None:
    """Put the shared parameters in the place of those of the same name and shape.

    Raises:
        ValueError: when a parameter of that name has another shape.
    """
    for name, own in list(module.named_parameters()):
        if name not in weights:
            continue
        if own.shape != weights[name].shape:
            raise ValueError(
                f"{name}: the module has {list(own.shape)}, the benchmark "
                f"{list(weights[name].shape)}"
            )
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, weights[name])


@dataclass(frozen=True)
class CaseInputs:
    """What the arms of a case are built from and run on, on this rank's device."""

    case: LayerCase
    tokens: RoutedTokens
    weights: Weights
    x: torch.Tensor  # [T, 1, H]


def case_inputs(case: LayerCase, rank: int = 0) -> CaseInputs:
    """Draw them, tokens for this ``rank``. No communication."""
    tokens = routed_tokens(case, rank)
    x = tokens.x.to(torch.cuda.current_device()).unsqueeze(1)
    return CaseInputs(case, tokens, draw_weights(case, tokens.router_weight), x)
