"""Facts of the layer that a user relies on, beyond its equality with the oracle."""

from __future__ import annotations

import pytest
import torch
from tiny_layer import HIDDEN, NUM_EXPERTS, build_layer, draw_parameters

from vqmoe_megatron.config import ModelConfig, VQConfig

pytestmark = pytest.mark.distributed

BASE = {"num_codes": 10, "codebook_update": "gradient", "init": "uniform", "norm": "none"}


def gradient_of_paths() -> dict:
    """In a rank: expert gradients of each path alone and of both at weight one half."""
    found = {}
    for path in ("dual", "continuous", "discrete"):
        vq = VQConfig(**BASE, path=path, vq_loss_coeff=0.0)
        parameters = draw_parameters(vq)
        if path == "dual":
            parameters["gate.linear.weight"].zero_()
            parameters["gate.linear.bias"].zero_()
        # The drawing order differs between paths; experts come first and are equal, these are not.
        generator = torch.Generator().manual_seed(1)
        for name in ("router.weight", "router.bias", "assigner.codebook.codes"):
            drawn = torch.randn(1, 12, HIDDEN, generator=generator, dtype=torch.float64)
            if name in parameters:
                shape = parameters[name].shape
                parameters[name] = drawn.reshape(-1)[: shape.numel()].view(shape)
        layer = build_layer(vq, parameters)
        x = torch.randn(6, 2, HIDDEN, generator=generator, dtype=torch.float64)
        layer(x)[0].sum().backward()
        found[path] = {
            name: p.grad for name, p in layer.named_parameters() if name.startswith("experts.")
        }
        found[f"{path} experts"] = sum(p.numel() for p in layer.experts.parameters())
    return found


def test_both_paths_touch_the_same_expert_tensors(ranks) -> None:  # noqa: ANN001
    (found,) = ranks(1).run(gradient_of_paths)
    assert found["dual experts"] == found["continuous experts"] == found["discrete experts"]
    for name, value in found["dual"].items():
        halves = 0.5 * (found["continuous"][name] + found["discrete"][name])
        torch.testing.assert_close(value, halves, rtol=1e-12, atol=1e-12)
        assert found["continuous"][name].any() and found["discrete"][name].any()


def codebook_gradient(expert_input: str, vq_loss_coeff: float) -> dict:
    vq = VQConfig(**BASE, expert_input=expert_input, vq_loss_coeff=vq_loss_coeff)
    layer = build_layer(vq, draw_parameters(vq))
    layer(torch.randn(6, 2, HIDDEN).double())[0].square().sum().backward()
    gradient = layer.assigner.codebook.codes.grad
    return {"gradient": torch.zeros(1) if gradient is None else gradient}


@pytest.mark.parametrize("expert_input", ["code", "blend", "blend_convex", "token"])
def test_the_task_never_moves_the_codebook(ranks, expert_input: str) -> None:  # noqa: ANN001
    (task_only,) = ranks(1).run(codebook_gradient, expert_input, 0.0)
    assert not task_only["gradient"].any()
    (with_loss,) = ranks(1).run(codebook_gradient, expert_input, 0.1)
    assert with_loss["gradient"].any()


def single_logit_router() -> dict:
    """In a rank: Megatron's routing with softmax over one selected logit, and its refusal."""
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    gradients = []
    for pre_softmax in (False, True):
        logits = torch.randn(5, NUM_EXPERTS, requires_grad=True)
        probs, _ = topk_routing_with_score_function(logits, 1, use_pre_softmax=pre_softmax)
        (probs * torch.randn_like(probs)).sum().backward()
        gradients.append(logits.grad)
    try:
        vq = VQConfig(**BASE)
        build_layer(vq, moe_router_pre_softmax=False)
        refusal = "accepted"
    except ValueError as error:
        refusal = str(error)
    return {"post": gradients[0], "pre": gradients[1], "refusal": refusal}


def test_softmax_over_one_logit_has_no_gradient_and_is_refused(ranks) -> None:  # noqa: ANN001
    (found,) = ranks(1).run(single_logit_router)
    assert not found["post"].any()
    assert found["pre"].any()
    assert "pre-softmax" in found["refusal"]
    with pytest.raises(ValueError, match="no gradient"):
        ModelConfig(moe_router_topk=1, moe_router_pre_softmax=False)


def assignments(num_codes: int) -> dict:
    vq = VQConfig(**{**BASE, "num_codes": num_codes})
    layer = build_layer(vq, draw_parameters(vq))
    assignment = layer.assigner(torch.randn(200, HIDDEN).double())
    return {"codes": assignment.codes, "experts": assignment.experts}


@pytest.mark.parametrize("num_codes", [3, 4, 10, 64])
def test_any_number_of_codes_maps_by_remainder(ranks, num_codes: int) -> None:  # noqa: ANN001
    (found,) = ranks(1).run(assignments, num_codes)
    assert torch.equal(found["experts"], found["codes"] % NUM_EXPERTS)
    assert found["codes"].unique().numel() > num_codes // 2


def refusals() -> dict[str, str]:
    attempts = {
        "padding": lambda: build_layer(VQConfig(**BASE))(
            torch.zeros(2, 2, HIDDEN), padding_mask=torch.zeros(2, 2)
        ),
        "jitter": lambda: build_layer(VQConfig(**BASE), moe_input_jitter_eps=0.1),
        "shared": lambda: build_layer(VQConfig(**BASE), moe_shared_expert_intermediate_size=32),
        "gate": lambda: build_layer(VQConfig(**BASE), moe_shared_expert_gate=True),
        "capacity": lambda: build_layer(
            VQConfig(**BASE, path="continuous"), num_moe_experts=1, moe_expert_capacity_factor=1.0
        ),
        "counts": lambda: build_layer(VQConfig(**{**BASE, "init": "data"}, code_map="balanced")),
        "slices": lambda: build_layer(VQConfig(**BASE, quantizer="product", num_code_slices=3)),
    }
    messages = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            messages[name] = "accepted"
        except ValueError as error:
            messages[name] = str(error)
    return messages


def test_what_it_does_not_compose_with_is_named(ranks) -> None:  # noqa: ANN001
    (messages,) = ranks(1).run(refusals)
    assert "no padding mask" in messages["padding"]
    assert "moe_input_jitter_eps=0.1" in messages["jitter"]
    assert "needs add_bias_linear=False" in messages["shared"]
    assert "moe_shared_expert_gate=True" in messages["gate"]
    assert "moe_expert_capacity_factor=1.0: the one expert takes" in messages["capacity"]
    assert "10 % 4 = 2" in messages["counts"]
    assert "16 % 3 = 1" in messages["slices"]


def layer_of_a_newer_megatron(is_mtp_layer: bool) -> list:
    """In a rank: a layer over a MoE layer that takes what Megatron 0.17 to 0.19 pass, as theirs do;
    what arrived there, and the layer's number."""
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from tiny_layer import transformer_config

    from vqmoe_megatron.config import VQConfig
    from vqmoe_megatron.moe import GroupedExperts, VQMoELayer

    class NewerMoELayer(MoELayer):
        def __init__(self, *args, is_mtp_layer=False, name=None) -> None:
            super().__init__(*args)
            self.arrived = [is_mtp_layer, name]

    class NewerVQMoELayer(VQMoELayer, NewerMoELayer):
        pass

    spec = ModuleSpec(
        module=NewerVQMoELayer,
        params={"vq": VQConfig(num_codes=8)},
        submodules=MoESubmodules(experts=ModuleSpec(module=GroupedExperts)),
    )
    config = transformer_config(num_layers=3)
    layer = spec(config=config, is_mtp_layer=is_mtp_layer, name="decoder.layers.0.mlp")
    layer.set_layer_number(1)
    return [*layer.arrived, layer.layer_number]


@pytest.mark.distributed
@pytest.mark.parametrize("is_mtp_layer", [False, True])
def test_what_newer_megatrons_pass_is_handed_to_their_layer(ranks, is_mtp_layer) -> None:
    (found,) = ranks(1).run(layer_of_a_newer_megatron, is_mtp_layer)
    assert found == [is_mtp_layer, "decoder.layers.0.mlp", 4 if is_mtp_layer else 1]


def dense_control(gated: bool) -> dict:
    """In a rank: a layer with one expert and no other path beside Megatron's plain MLP."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from tiny_layer import FFN, transformer_config

    vq = VQConfig(**BASE, path="continuous")
    layer = build_layer(
        vq,
        draw_parameters(vq, gated=gated, num_experts=1),
        num_moe_experts=1,
        gated_linear_unit=gated,
    )

    def nothing_travels(*_: object) -> None:
        raise AssertionError("rows were dispatched")

    layer.engine.dispatch = layer.engine.plan = nothing_travels
    config = transformer_config(num_moe_experts=1, gated_linear_unit=gated)
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    mlp = MLP(config, linears, ffn_hidden_size=FFN).double()
    pairs = {
        "experts.weight1": mlp.linear_fc1.weight,
        "experts.bias1": mlp.linear_fc1.bias,
        "experts.weight2": mlp.linear_fc2.weight,
        "experts.bias2": mlp.linear_fc2.bias,
    }
    own = dict(layer.named_parameters())
    with torch.no_grad():
        for name, parameter in pairs.items():
            parameter.copy_(own[name].squeeze(0))
    x = torch.randn(6, 2, HIDDEN, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    output, _ = layer(inputs[0])
    expected, bias = mlp(inputs[1])
    expected = expected + bias
    for y in (output, expected):
        y.square().sum().backward()
    return {
        "names": sorted(own),
        "pairs": [
            (output.detach(), expected.detach()),
            (inputs[0].grad, inputs[1].grad),
            *((own[name].grad.squeeze(0), p.grad) for name, p in pairs.items()),
        ],
        "load": layer.step_expert_load.tolist(),
    }


@pytest.mark.parametrize("gated", [False, True])
def test_one_expert_is_a_plain_mlp(ranks, gated: bool) -> None:  # noqa: ANN001
    (found,) = ranks(1).run(dense_control, gated)
    assert found["names"] == [f"experts.{kind}{n}" for kind in ("bias", "weight") for n in (1, 2)]
    for ours, theirs in found["pairs"]:
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
        assert ours.any()
    assert found["load"] == [12.0]


def beside_megatrons_layer() -> dict:
    """In a rank: path=continuous with a shared expert, and Megatron's layer of the same parts."""
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from tiny_layer import SHARED_FFN

    vq = VQConfig(**BASE, path="continuous")
    layer = build_layer(
        vq,
        draw_parameters(vq, bias=False, shared=True),
        add_bias_linear=False,
        moe_shared_expert_intermediate_size=SHARED_FFN,
        moe_router_topk=2,
    )
    theirs = MoELayer(layer.config, layer.submodules, 1, layer.pg_collection).double()
    theirs.load_state_dict(layer.state_dict())
    x = torch.randn(6, 2, HIDDEN, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [module(x)[0] for module, x in zip((layer, theirs), inputs, strict=True)]
    for y in outputs:
        y.square().sum().backward()
    shared = layer.shared_experts
    return {
        "pairs": [outputs, [x.grad for x in inputs]]
        + [[p.grad, q.grad] for p, q in zip(layer.parameters(), theirs.parameters(), strict=True)],
        "allreduce": [getattr(p, "allreduce", True) for p in shared.parameters()],
        "alone": shared(x).detach(),
        "gate": type(layer.gate).__name__,
    }


def test_a_shared_expert_is_megatrons_and_added_as_there(ranks) -> None:  # noqa: ANN001
    (found,) = ranks(1).run(beside_megatrons_layer)
    for ours, theirs in found["pairs"]:
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert found["alone"].abs().max() > 1e-2
    assert found["allreduce"] == [True, True]  # no expert: reduced over all data-parallel ranks
    assert found["gate"] == "OnePath"
