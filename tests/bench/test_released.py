"""The released formulation on the facts that are known of it; the gate holds it to the oracle."""

from __future__ import annotations

import pytest
import torch

from vqmoe_megatron.bench.released import ReleasedLayer
from vqmoe_megatron.config.vq import VQConfig

N, K, H, F = 3, 5, 8, 12


def build(**vq) -> ReleasedLayer:  # noqa: ANN003
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.randn(*shape, generator=generator))

    shared = {
        "experts.weight1": draw(N, F, H),
        "experts.weight2": draw(N, H, F),
        "router.weight": draw(N, H),
        "gate.linear.weight": draw(2, H),
        "gate.linear.bias": draw(2),
    }
    settings = {"num_codes": K, "norm": "none", "path": "discrete", **vq}
    return ReleasedLayer(VQConfig(**settings), torch.randn(K, H, generator=generator), shared)


def tokens() -> torch.Tensor:
    return torch.randn(20, 1, H, generator=torch.Generator().manual_seed(1))


def test_equal_codes_give_equal_outputs() -> None:
    layer = build().eval()
    x = tokens()
    y, loss = layer(x)
    ids = torch.cdist(x[:, 0], layer.codes).argmin(dim=1)
    assert loss is None
    for code in ids.unique():
        rows = y[ids == code]
        assert torch.allclose(rows, rows[:1].expand_as(rows), atol=1e-5)


def test_straight_through_passes_the_expert_s_gradient_and_none_to_the_codes() -> None:
    layer = build(vq_loss_coeff=0.0)
    x = tokens().requires_grad_()
    y, loss = layer(x)
    (y.sum() + loss).backward()
    assert x.grad.abs().max() > 0
    assert layer.codes.grad.abs().max() == 0  # the task never moves the codebook


def test_the_codebook_follows_its_loss() -> None:
    layer = build()
    layer(tokens())[1].backward()
    assert layer.codes.grad.abs().max() > 0


def test_blend_is_between_token_and_code() -> None:
    whole, none = build(expert_input="blend", contribution_rate=0.0), build(expert_input="blend")
    x = tokens()
    u = x[:, 0]
    ids = torch.cdist(u, whole.codes).argmin(dim=1) % N
    expected = torch.stack([
        whole.shared["experts.weight2"][e]
        @ torch.nn.functional.gelu(whole.shared["experts.weight1"][e] @ row)
        for e, row in zip(ids, u, strict=True)
    ])  # fmt: skip
    assert torch.allclose(whole(x)[0][:, 0], expected, atol=1e-4)
    assert not torch.allclose(none(x)[0][:, 0], expected, atol=1e-4)


def test_other_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="expert_input=token"):
        build(expert_input="token")
