"""A VQ loss that is off costs nothing; weights are read when they have arrived."""

from __future__ import annotations

import pytest
import torch
from tiny_layer import HIDDEN, build_layer, draw_parameters

from vqmoe_megatron.config import VQConfig


def with_losses(update: str, coefficients: dict[str, float]) -> dict:
    """In a rank: what hangs on a layer's output, what is saved for it, and what it measures."""
    from vqmoe_megatron.moe import synchronize_codebooks

    vq = VQConfig(num_codes=12, codebook_update=update, init="uniform", **coefficients)
    layer = build_layer(vq, {n: p.float() for n, p in draw_parameters(vq).items()})
    x = torch.randn(6, 2, HIDDEN, generator=torch.Generator().manual_seed(0)).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.nbytes) or t, lambda t: t
    ):
        output, _ = layer(x)
    left, names = [output.grad_fn], set()
    while left:
        node = left.pop()
        if node.name() not in names or node.next_functions:
            names.add(node.name())
            left += [following for following, _ in node.next_functions if following is not None]
    output.sum().backward()
    (statistics,) = synchronize_codebooks([layer])
    codes = layer.assigner.codebook.codes.grad
    return {
        "loss nodes": sorted(n for n in names if "QuantizationError" in n or "AuxLoss" in n),
        "saved": sum(saved),
        "measured": float(statistics.scalars["commitment_loss"]),
        "x": x.grad,
        "codes": None if codes is None else codes.clone(),
    }


@pytest.mark.distributed
@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_a_loss_of_coefficient_0_is_off_and_only_measured(ranks, update: str) -> None:  # noqa: ANN001
    def found(**coefficients: float) -> dict:
        return ranks(1).run(with_losses, update, coefficients)[0]

    on, none, without = found(), found(vq_loss_coeff=0.0), found(commitment_coeff=0.0)
    assert on["loss nodes"] and not torch.equal(none["x"], on["x"])
    assert torch.equal(without["x"], none["x"])  # nothing pulls tokens
    if update == "ema":
        assert none["loss nodes"] == without["loss nodes"] == []
        assert none["saved"] == without["saved"] < on["saved"]
    else:
        assert torch.equal(without["codes"], on["codes"]) and on["codes"].any()
        assert not none["codes"].any()
    for other in (none, without):
        assert other["measured"] == on["measured"] > 0


def read_before_a_gather(settings: dict) -> bool:
    """In a rank: whether tokens were prepared by weights that a hook on the codebook still brings,
    as those of Megatron's overlapped gather do."""
    vq = VQConfig(num_codes=12, init="uniform", **settings)
    layer = build_layer(vq, {n: p.float() for n, p in draw_parameters(vq).items()})
    codebook, x = layer.assigner.codebook, torch.randn(6, HIDDEN)
    arrived = {name: p.detach().clone() for name, p in codebook.named_parameters()}
    expected = layer.assigner(x)
    for parameter in codebook.parameters():
        parameter.data.normal_()

    def bring(*_: object) -> None:
        for name, parameter in codebook.named_parameters():
            parameter.data.copy_(arrived[name])

    codebook.register_forward_pre_hook(bring)
    found = layer.assigner(x)
    return not (
        torch.equal(found.prepared, expected.prepared) and torch.equal(found.codes, expected.codes)
    )


@pytest.mark.distributed
@pytest.mark.parametrize(
    "settings",
    [
        {"codebook_update": "gradient"},
        {"quantizer": "low_dim", "code_dim": 4, "train_projection": True},
    ],
    ids=["codes", "projection"],
)
def test_nothing_of_a_codebook_is_read_before_its_hooks_ran(ranks, settings: dict) -> None:  # noqa: ANN001
    assert ranks(1).run(read_before_a_gather, settings) == [False]
