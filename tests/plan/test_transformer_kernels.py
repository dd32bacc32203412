"""Kernels outside the MoE layer by hand: attention, dense MLP, output layer, element-wise work."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bytes_moved import BytesMoved
from real_model import recipe

from vqmoe_megatron.plan.flops import module_flops
from vqmoe_megatron.plan.hardware import PROFILES
from vqmoe_megatron.plan.kernels import Kernel
from vqmoe_megatron.plan.layout import check_layout
from vqmoe_megatron.plan.shape import LayerShape
from vqmoe_megatron.plan.transformer_kernels import (
    activation_kernels,
    attention_kernels,
    dense_mlp_kernels,
    embedding_kernels,
    layer_element_wise,
    output_layer_kernels,
)

FUSED, LOCAL = PROFILES["H100"], replace(PROFILES["H100"], kernels="local")
CPU = PROFILES["CPU"]
SIZES = [
    "model.hidden_size=64", "model.num_attention_heads=4", "model.num_query_groups=2",
    "model.seq_length=128", "train.micro_batch_size=2", "model.vocab_size=512",
    "model.moe_ffn_hidden_size=96", "model.bf16=true",
]  # fmt: skip
TOKENS, HIDDEN = 2 * 128, 64
CONFIG = recipe(SIZES)
LAYOUT = check_layout(CONFIG, 1)


def by_name(kernels) -> dict[tuple[str, str], Kernel]:
    return {(kernel.name, kernel.phase): kernel for kernel in kernels}


def test_a_cpu_writes_scores_for_dropout_alone() -> None:
    dropout = recipe([*SIZES, "model.attention_dropout=0.1"])
    fused, cpu, local, dropping = (
        by_name(attention_kernels(config, LAYOUT, hardware))
        for config, hardware in ((CONFIG, FUSED), (CONFIG, CPU), (CONFIG, LOCAL), (dropout, CPU))
    )
    assert cpu == fused and dropping == local


def test_fused_attention_never_writes_its_scores() -> None:
    fused = by_name(attention_kernels(CONFIG, LAYOUT, FUSED))
    local = by_name(attention_kernels(CONFIG, LAYOUT, LOCAL))
    scores = 2 * 4 * 128 * 128 * 2
    assert set(local) - set(fused) == {
        ("core attention scores", "forward"), ("core attention scores", "backward")
    }  # fmt: skip
    extra = local["core attention scores", "forward"]
    assert (extra.read_bytes, extra.written_bytes) == (3 * scores, 3 * scores)
    flops = module_flops(CONFIG, LAYOUT)
    core, projections = fused["core attention", "forward"], fused["projections", "forward"]
    assert core.operations == flops.core_attention == 4 * TOKENS * 128 * 64
    assert core.operations + projections.operations == flops.attention
    mixed, context = TOKENS * 128 * 2, TOKENS * 64 * 2  # 4 + 2 + 2 heads of 16 columns
    assert (core.read_bytes, core.written_bytes) == (mixed, context)
    weights = (64 * 128 + 64 * 64) * 2
    assert projections.read_bytes == TOKENS * HIDDEN * 2 + context + weights
    assert projections.written_bytes == mixed + TOKENS * HIDDEN * 2


def test_a_dense_layer_reads_its_weights() -> None:
    found = by_name(dense_mlp_kernels(CONFIG, LAYOUT))
    products = found["products", "forward"]
    assert products.operations == module_flops(CONFIG, LAYOUT).dense_mlp
    width = products.operations // (2 * TOKENS * HIDDEN * 2)  # fc1 and fc2
    assert products.read_bytes == 2 * (TOKENS * (HIDDEN + width) + 2 * HIDDEN * width)
    assert found["activation of the dense MLP", "forward"].written_bytes == TOKENS * width * 2


def test_the_loss_moves_fp32_logits() -> None:
    found = by_name(output_layer_kernels(CONFIG, LAYOUT))
    assert found["product", "forward"].operations == 2 * TOKENS * HIDDEN * 512
    logits = torch.randn(TOKENS, 512, dtype=torch.bfloat16)
    with BytesMoved() as moved:  # Megatron's VocabParallelCrossEntropy on one rank
        exact = logits.float()
        exact.max(dim=-1)
        exact.sub_(1.0)
        exponentials = torch.exp(exact, out=exact)
        total = exponentials.sum(dim=-1)
        exponentials.div_(total.unsqueeze(-1))
    loss = found["loss", "forward"]
    assert loss.read_bytes == pytest.approx(moved.read, rel=0.02)
    assert loss.written_bytes == pytest.approx(moved.written, rel=0.02)


@pytest.mark.parametrize("halves", [1, 2])
def test_an_activation_moves_what_torch_moves(halves: int) -> None:
    inputs = torch.randn(256, halves * 512, requires_grad=True)
    with BytesMoved() as forward:
        if halves == 2:
            gate, up = inputs.chunk(2, dim=-1)
            output = torch.nn.functional.silu(gate) * up
        else:
            output = torch.nn.functional.gelu(inputs)
    grad = torch.ones_like(output)
    with BytesMoved() as backward:
        output.backward(grad)
    found = by_name(activation_kernels("activation", 256 * 512, halves, 4))
    for phase, moved in (("forward", forward), ("backward", backward)):
        planned = found["activation", phase]
        both = planned.read_bytes + planned.written_bytes
        assert both == pytest.approx(moved.read + moved.written, rel=0.25), phase


def test_element_wise_work_follows_the_hidden_states() -> None:
    layer = LayerShape.from_config(CONFIG, LAYOUT)
    hidden = TOKENS * HIDDEN * 2
    found = by_name(layer_element_wise(CONFIG, LAYOUT, layer))
    assert found["norms", "forward"].read_bytes == 2 * hidden
    assert found["residuals", "backward"].read_bytes == 4 * hidden
    rope = recipe([*SIZES, "model.position_embedding_type=rope"])
    turned = by_name(layer_element_wise(rope, LAYOUT, layer))["rope", "forward"]
    assert turned.written_bytes == 5 * TOKENS * (4 + 2) * 16 * 2
    assert by_name(embedding_kernels(CONFIG, layer))["embedding", "forward"].read_bytes == hidden
