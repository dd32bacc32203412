"""The vision transformer against a slow one in plain torch, in fp64."""

from __future__ import annotations

import pytest
import torch
from images_run import VISION

pytestmark = pytest.mark.distributed


def test_patches_are_cut_row_by_row() -> None:
    from vqmoe_megatron.engines.megatron.vision_model import cut_patches

    images = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    patches = cut_patches(images, 2)
    assert patches.shape == (2, 6, 12)
    for row in range(2):
        for column in range(3):
            cut = images[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert torch.equal(patches[:, 3 * row + column], cut.reshape(2, -1))


def compare(overrides: list[str]) -> dict[str, float]:
    """In a rank: the largest differences of logits and gradients to the oracle's."""
    from small_run import PARITY

    from vqmoe_megatron.config.recipe import load_recipe
    from vqmoe_megatron.engines.megatron.model import build_chunks, build_transformer_config
    from vqmoe_megatron.plan.layout import check_layout

    config = load_recipe(PARITY, [*VISION, "model.moe_router_dtype=fp64", *overrides])
    layout = check_layout(config, 1, "cpu")
    (model,) = build_chunks(config, build_transformer_config(config, layout), layout)
    model.double()
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(3, 1, 8, 8, dtype=torch.float64, generator=generator)
    weight = torch.randn(3, 10, dtype=torch.float64, generator=generator)
    for parameter in model.parameters():  # biases and positions count, too
        noise = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        parameter.data += 0.05 * noise
    model.eval()
    model(images)  # codes from the data
    found = []
    for function in (model, lambda images: oracle(model, images)):
        model.zero_grad()
        logits = function(images)
        (logits * weight).sum().backward()
        found.append({"logits": logits.detach()} | {
            name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
        })  # fmt: skip
    ours, theirs = found
    assert ours.keys() == theirs.keys() and len(ours) > 30
    return {name: float((ours[name] - theirs[name]).abs().max()) for name in ours}


def oracle(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The model in plain torch, image by image; its VQMoE layers, which have an oracle of their
    own, are called."""
    projection, positions = model.embedding.patch_projection, model.embedding.position_embeddings
    kernel = projection.weight.view(-1, 1, 2, 2)
    hidden = torch.nn.functional.conv2d(images, kernel, projection.bias, stride=2)
    hidden = hidden.flatten(2).transpose(1, 2) + positions.weight  # [b, S, H]
    for layer in model.decoder.layers:
        attention = layer.self_attention
        mixed = attention.linear_qkv(layer.input_layernorm(hidden))[0]
        rows = []
        for image in mixed:  # [S, 3 H], as Megatron lays it: by head its q, k and v
            heads = []
            for head in image.view(16, 4, 24).unbind(1):
                q, k, v = head.split(8, dim=-1)
                heads.append(torch.softmax(q @ k.T / 8**0.5, dim=-1) @ v)
            rows.append(torch.cat(heads, dim=-1))
        output, bias = attention.linear_proj(torch.stack(rows))
        hidden = hidden + output + bias
        normed = layer.pre_mlp_layernorm(hidden).transpose(0, 1).contiguous()
        hidden = hidden + layer.mlp(normed)[0].transpose(0, 1)
    hidden = model.decoder.final_layernorm(hidden)
    return hidden.mean(dim=1) @ model.output_layer.weight.T + model.output_layer.bias


@pytest.mark.parametrize("path", ["dual", "continuous"])
def test_logits_and_gradients_are_those_of_plain_torch(ranks, path: str) -> None:  # noqa: ANN001
    (found,) = ranks(1).run(compare, [f"vq.path={path}"])
    assert max(found.values()) < 1e-9, {k: v for k, v in found.items() if v >= 1e-9}
