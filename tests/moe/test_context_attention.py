"""Attention of sequences cut over ranks against that of whole ones, outputs and gradients."""

from __future__ import annotations

import pytest
import torch

HEADS, COLUMNS, LENGTH, BATCH = 4, 8, 24, 2
NAMES = ("output", "query", "key", "value")
pytestmark = pytest.mark.distributed


def whole_states(dtype: torch.dtype, groups: int) -> list[torch.Tensor]:
    """Query, key, value and the output's gradient, the same on every rank."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(heads, COLUMNS) for heads in (HEADS, groups, groups)] + [(HEADS * COLUMNS,)]
    return [
        torch.randn(LENGTH, BATCH, *shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in shapes
    ]


def attention_of(num_parts: int, groups: int, **changes):  # noqa: ANN201
    """In a rank: our attention of a configuration with so many context-parallel ranks."""
    from megatron.core.transformer.enums import AttnMaskType
    from tiny_layer import transformer_config

    from vqmoe_megatron.moe.cpu_attention import CpuAttention

    config = transformer_config(
        num_layers=2,
        hidden_size=HEADS * COLUMNS,
        num_attention_heads=HEADS,
        num_query_groups=groups,
        attention_dropout=changes.get("attention_dropout", 0.0),
    )
    config.context_parallel_size = num_parts
    return CpuAttention(config, 1, AttnMaskType.causal, "self")


def evaluated(attention, states: list[torch.Tensor]) -> list[torch.Tensor]:  # noqa: ANN001
    """Output and the gradients of query, key and value."""
    *inputs, grad = (state.clone() for state in states)
    inputs = [state.requires_grad_() for state in inputs]
    output = attention(*inputs, None)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad)]


def differences(dtype: str, groups: int) -> dict[str, float]:
    """In a rank: the largest difference to this rank's part of whole attention, relative."""
    from megatron.core import parallel_state

    from vqmoe_megatron.moe.context_cut import own_part

    cp = parallel_state.get_context_parallel_group()
    states = whole_states(getattr(torch, dtype), groups)
    wanted = [own_part(part, cp, 0) for part in evaluated(attention_of(1, groups), states)]
    cut = [own_part(state, cp, 0) for state in states]
    found = evaluated(attention_of(cp.size(), groups), cut)
    assert found[0].shape == wanted[0].shape
    return {
        name: float((one - other).abs().max() / other.abs().max())
        for name, one, other in zip(NAMES, found, wanted, strict=True)
    }


@pytest.mark.parametrize(
    ("num_ranks", "dtype", "groups", "limit"),
    [
        (2, "float64", HEADS, 1e-12),
        (2, "float64", 2, 1e-12),
        (2, "float32", HEADS, 1e-5),
        pytest.param(4, "float64", 1, 1e-12, marks=pytest.mark.full),
    ],
)
def test_it_is_the_attention_of_whole_sequences(ranks, num_ranks, dtype, groups, limit) -> None:
    layout = {"context_parallel_size": num_ranks}
    for found in ranks(num_ranks).run(differences, dtype, groups, layout=layout):
        assert max(found.values()) < limit, found


def refused(case: str) -> str:
    """In a rank: the words for what cut sequences do not have."""
    from megatron.core import parallel_state

    from vqmoe_megatron.moe.context_cut import own_part

    cp = parallel_state.get_context_parallel_group()
    dropout = 0.5 if case == "dropout" else 0.0
    attention = attention_of(cp.size(), HEADS, attention_dropout=dropout)
    query, key, value, _ = (own_part(s, cp, 0) for s in whole_states(torch.float32, HEADS))
    length = query.shape[0]
    mask = torch.zeros(1, 1, length, length, dtype=torch.bool) if case == "mask" else None
    others = {"attention_bias": torch.zeros(1)} if case == "bias" else {}
    try:
        attention(query, key, value, mask, **others)
    except ValueError as error:
        return str(error)
    return "taken"


@pytest.mark.parametrize("case", ["dropout", "mask", "bias"])
def test_what_only_transformer_engine_could_do_is_refused(ranks, case) -> None:
    for text in ranks(2).run(refused, case, layout={"context_parallel_size": 2}):
        assert "context_parallel_size=2" in text and "Transformer Engine" in text
