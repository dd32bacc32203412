"""Input gradients of experts at code rows against autograd, in which every token has its own graph.

n = 3 local experts, of which the last has a slot but no token; S = 6 slots; R' = 9 token rows. The
slots are dealt 3, 2, 1 to the experts, or 2, 2, 2.
"""

from __future__ import annotations

import pytest
import torch
from tiny_layer import ACTIVATIONS, FFN, HIDDEN, transformer_config

from vqmoe_megatron.moe.code_rows import CodeRows, place_code_rows

pytestmark = pytest.mark.distributed

UNEVEN, EVEN = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2]
NUM_SLOTS = 6
SLOTS = [0, 0, 0, 2, 2, 3, 3, 3, 4]
KINDS = {
    "plain": {},
    "relu": {"activation": "relu"},
    "bias": {"bias": True},
    "gated": {"activation": "silu", "gated": True},
    "gated bias": {"activation": "silu", "gated": True, "bias": True},
    "megatron": {"megatron": True},
    "megatron gated": {"activation": "silu", "gated": True, "megatron": True},
}


def code_rows(expert_of_slot: list[int]) -> CodeRows:
    """Of one rank, whose rows are its slots."""
    placed = place_code_rows(torch.tensor(expert_of_slot), num_experts=3, num_ranks=1, rank=0)
    assert placed.expert_of_slot.tolist() == expert_of_slot
    return placed


def build_experts(kind: dict) -> torch.nn.Module:
    """In a rank: three experts, fp64, every parameter drawn at a scale that bends activations."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from vqmoe_megatron.moe import GroupedExperts

    config = transformer_config(
        activation_func=ACTIVATIONS[kind.get("activation", "gelu")],
        gated_linear_unit=kind.get("gated", False),
        add_bias_linear=kind.get("bias", False),
    )
    if kind.get("megatron"):
        submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        experts = SequentialMLP(3, config, submodules, pg_collection=get_default_pg_collection())
    else:
        experts = GroupedExperts(3, config, pg_collection=get_default_pg_collection())
    experts.double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in experts.parameters():
            drawn = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.copy_(0.5 * drawn)
    return experts


def drawn_rows(slots: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Expert inputs [S, H] and the token rows' gradients [R', H]."""
    generator = torch.Generator().manual_seed(6)
    shape = NUM_SLOTS + len(slots), HIDDEN
    both = torch.randn(shape, generator=generator, dtype=torch.float64)
    return both[:NUM_SLOTS], both[NUM_SLOTS:]


def compare(kind: dict, expert_of_slot: list[int], slots: list[int]) -> dict:
    """In a rank: our gradients of token rows, and autograd's through the experts on those rows."""
    from vqmoe_megatron.moe.expert_slopes import expert_input_gradient

    experts = build_experts(kind)
    inputs, grads = drawn_rows(slots)
    of_tokens = torch.tensor(slots, dtype=torch.int64)
    found = expert_input_gradient(experts, inputs, code_rows(expert_of_slot), of_tokens, grads)
    touched = [name for name, p in experts.named_parameters() if p.grad is not None]
    tokens = inputs[slots].clone().requires_grad_()
    counts = [[expert_of_slot[s] for s in slots].count(e) for e in range(3)]
    ones = torch.ones(len(slots), dtype=torch.float64)
    outputs, _ = experts(tokens, torch.tensor(counts), ones)
    outputs.backward(grads)
    return {
        "found": found,
        "expected": tokens.grad,
        "touched": touched,
        "requires_grad": found.requires_grad,
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("expert_of_slot", [UNEVEN, EVEN], ids=["uneven", "even"])
def test_equals_autograd_of_the_tokens_own_graph(
    ranks,  # noqa: ANN001
    expert_of_slot: list[int],
    kind: str,
) -> None:
    (result,) = ranks(1).run(compare, KINDS[kind], expert_of_slot, SLOTS)
    assert result["expected"].any()
    torch.testing.assert_close(result["found"], result["expected"], rtol=1e-12, atol=1e-12)
    assert result["touched"] == [] and result["requires_grad"] is False


@pytest.mark.parametrize("slots", [[], [5], [1] * 7], ids=["no token", "one token", "one slot"])
@pytest.mark.parametrize("kind", ["gated bias", "megatron"])
def test_few_rows(ranks, kind: str, slots: list[int]) -> None:  # noqa: ANN001
    (result,) = ranks(1).run(compare, KINDS[kind], UNEVEN, slots)
    assert result["found"].shape == (len(slots), HIDDEN)
    torch.testing.assert_close(result["found"], result["expected"], rtol=1e-12, atol=1e-12)


def shard_of_gradient(activation: str, gated: bool, dtype: str) -> torch.Tensor:
    """In a rank: this expert-tensor rank's part, with weights cut from those of one rank."""
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from vqmoe_megatron.moe import GroupedExperts
    from vqmoe_megatron.moe.expert_slopes import expert_input_gradient

    shard = parallel_state.get_expert_tensor_parallel_rank()
    num_shards = parallel_state.get_expert_tensor_parallel_world_size()
    config = transformer_config(
        activation_func=ACTIVATIONS[activation], gated_linear_unit=gated, add_bias_linear=True
    )
    experts = GroupedExperts(3, config, pg_collection=get_default_pg_collection())
    experts.to(getattr(torch, dtype))
    generator = torch.Generator().manual_seed(5)
    halves = 2 if gated else 1
    weight1, weight2, bias1 = (
        0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((3, halves, FFN, HIDDEN), (3, HIDDEN, FFN), (3, halves, FFN))
    )
    with torch.no_grad():
        experts.weight1.copy_(weight1.chunk(num_shards, dim=2)[shard].flatten(1, 2))
        experts.weight2.copy_(weight2.chunk(num_shards, dim=2)[shard])
        experts.bias1.copy_(bias1.chunk(num_shards, dim=2)[shard].flatten(1))
    inputs, grads = (rows.to(experts.weight1.dtype) for rows in drawn_rows(SLOTS))
    return expert_input_gradient(experts, inputs, code_rows(UNEVEN), torch.tensor(SLOTS), grads)


@pytest.mark.parametrize(("activation", "gated"), [("gelu", False), ("silu", True)])
def test_parts_of_expert_tensor_ranks_sum_to_the_whole(ranks, activation: str, gated: bool) -> None:  # noqa: ANN001
    (whole,) = ranks(1).run(shard_of_gradient, activation, gated, "float64")
    layout = {"expert_tensor_parallel_size": 2}
    parts = ranks(2).run(shard_of_gradient, activation, gated, "float64", layout=layout)
    assert not torch.allclose(parts[0], parts[1])
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=1e-12)


def test_bf16_keeps_its_dtype_and_agrees(ranks) -> None:  # noqa: ANN001
    (exact,) = ranks(1).run(shard_of_gradient, "silu", True, "float64")
    (half,) = ranks(1).run(shard_of_gradient, "silu", True, "bfloat16")
    assert half.dtype == torch.bfloat16
    assert float((half.double() - exact).norm() / exact.norm()) < 0.03
