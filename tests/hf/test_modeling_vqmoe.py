"""Parts of the modelling file against slow oracles, in fp64: no ranks, no checkpoint."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from vqmoe_megatron.config.vq import VQConfig
from vqmoe_megatron.vq.fill_oracle import filled_output

T, H, N, K = 40, 8, 4, 5
FILLED = {
    "top-2": ({}, 2, None),
    "top-1 of three": ({"num_fill_experts": 3}, 1, None),
    "threshold": ({"threshold_routing": True}, 1, 0.3),
    "threshold not set yet": ({"threshold_routing": True, "num_fill_experts": 2}, 1, 0.0),
    "threshold alone": ({"threshold_routing": True, "num_fill_experts": 0}, 1, 0.3),
}


@pytest.mark.parametrize("name", FILLED)
def test_a_filled_layer_is_the_oracle_s(name) -> None:
    from vqmoe_megatron.hf.modeling_vqmoe import MoE, VQMoEConfig

    settings, topk, tau = FILLED[name]
    vq = VQConfig(num_codes=K, path="filled", norm="none", **settings)
    config = VQMoEConfig(
        hidden_size=H,
        num_moe_experts=N,
        moe_ffn_hidden_size=6,
        moe_router_topk=topk,
        moe_router_dtype="fp64",
        num_codes=K,
        code_dim=H,
        path="filled",
        num_fill_experts=vq.num_fill_experts,
        threshold_routing=vq.threshold_routing,
    )
    torch.manual_seed(3)
    layer = MoE(config, 0).double()
    torch.nn.init.normal_(layer.router.weight)
    codes = torch.randn(K, H).double()
    with torch.no_grad():
        layer.discrete.codes.copy_(codes)
        if vq.has_fill_table:
            layer.discrete.table.copy_(torch.cat([expert(codes) for expert in layer.experts]))
        if tau:
            layer.discrete.tau.fill_(tau)
        x = torch.randn(T, H).float().double()  # searched in fp32
        y = layer(x.unsqueeze(0), None)[0]
        logits = layer.router.logits(x)
        nearest = torch.cdist(x, codes).argmin(dim=1)
        counts = set()
        for token in range(T):
            vector = codes[nearest[token]]
            distance = float((x[token] - vector).square().mean().sqrt())
            expected, chosen = filled_output(
                x[token],
                logits[token],
                lambda number, row: layer.experts[number](row),
                vector,
                distance,
                None,
                vq,
                topk,
                tau or None,
            )
            counts.add(len(chosen))
            torch.testing.assert_close(y[token], expected, rtol=1e-10, atol=1e-12)
    assert len(counts) > 1 or not tau  # tokens with none, one and several exact experts


def test_close_codes_far_from_zero_are_told_apart() -> None:
    from vqmoe_megatron.hf.modeling_vqmoe import nearest

    torch.manual_seed(5)
    codes = 300.0 + 0.01 * torch.randn(2, 50, 6)
    tokens = 300.0 + 0.01 * torch.randn(200, 2, 6)
    expected = torch.cdist(tokens.double().transpose(0, 1), codes.double()).argmin(dim=2).t()
    assert nearest(tokens, codes).equal(expected)


def test_padding_may_have_any_number() -> None:
    from vqmoe_megatron.hf.modeling_vqmoe import VQMoEConfig, VQMoEForCausalLM

    torch.manual_seed(7)
    config = VQMoEConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_moe_experts=2,
        moe_ffn_hidden_size=8,
        memory_layers=[0],
        memory_num_rows=32,
        memory_vocab_size=24,
    )
    model = VQMoEForCausalLM(config).eval()
    with torch.no_grad():
        model.model.memory_codes.code_of_token.copy_(torch.arange(24))
        model.model.layers[0].mlp.memory.rows.normal_()
        ids = torch.randint(0, 20, (1, 6))
        plain = model(ids).logits
        padded = torch.cat([torch.full((1, 3), 999), ids], dim=1)
        mask = torch.tensor([[0] * 3 + [1] * 6])
        found = model(padded, attention_mask=mask).logits[:, 3:]
    torch.testing.assert_close(found, plain)
