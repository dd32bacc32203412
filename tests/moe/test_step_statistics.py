"""Statistics stay exact when a model is cast to half precision."""

from __future__ import annotations

import pytest
import torch

from vqmoe_megatron.moe.step_statistics import KeepsStatistics


class Counter(KeepsStatistics):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("count", torch.zeros(1), persistent=False)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_cast_leaves_the_statistics(half: torch.dtype) -> None:
    counter = torch.nn.Sequential(Counter()).to(half)[0]
    for _ in range(1000):
        counter.count += 1.0
    assert counter.count.item() == 1000.0
    assert counter.weight.dtype == counter.kept.dtype == half


def test_fp64_is_followed() -> None:
    assert Counter().double().count.dtype == torch.float64


def counted(dtype: str) -> list[float]:
    """In a rank: rows per expert, the gate's tokens and the microbatches after one backward."""
    from tiny_layer import HIDDEN, build_layer, draw_parameters

    from vqmoe_megatron.config import VQConfig

    vq = VQConfig(num_codes=8, init="uniform")
    kind = getattr(torch, dtype)
    layer = build_layer(vq, draw_parameters(vq), params_dtype=kind, bf16=kind == torch.bfloat16)
    layer = layer.to(kind).train()
    output, _ = layer(torch.randn(601, 1, HIDDEN, dtype=kind).requires_grad_())
    output.float().sum().backward()
    return [layer.step_expert_load.sum().item(), layer.step_gate[1].item()]


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_counts_every_row(ranks, dtype: str) -> None:  # noqa: ANN001
    ((rows, tokens),) = ranks(1).run(counted, dtype)
    assert tokens == 601.0  # 600 or 602 in bf16
    assert rows == 2 * 601.0  # one expert of the router, one of the code
