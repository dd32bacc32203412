"""VQRouter in Megatron's own MoELayer agrees with VQMoELayer's discrete path on tokens.

Same codes, same experts, Megatron's dispatchers and either kind of experts: output and gradients
must agree, since in both a token goes to the expert of its code with weight one.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tiny_layer import (
    FFN,
    HIDDEN,
    NUM_EXPERTS,
    build_layer,
    draw_parameters,
    expert_slice,
    transformer_config,
)

from vqmoe_megatron.config import VQConfig

pytestmark = pytest.mark.distributed

BASE = {
    "num_codes": 10,
    "path": "discrete",
    "expert_input": "token",
    "norm": "none",
    "codebook_update": "gradient",
    "init": "uniform",
}
LAYOUTS = {"1rank": (1, {}), "ep2": (4, {"expert_model_parallel_size": 2})}
EP2_ETP2 = {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2}


def megatron_layer(vq: VQConfig, parameters: dict, dispatcher: str, experts: str):  # noqa: ANN201
    """In a rank: Megatron's MoELayer with a VQRouter, in fp64, holding ``parameters``."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    from vqmoe_megatron.moe import GroupedExperts, VQRouter

    specs = {
        "grouped": ModuleSpec(module=GroupedExperts),
        "sequential": ModuleSpec(
            module=SequentialMLP,
            submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        ),
    }
    layer = MoELayer(
        # SequentialMLP's bias and probabilities meet only without biases
        transformer_config(moe_token_dispatcher_type=dispatcher, add_bias_linear=False),
        MoESubmodules(experts=specs[experts], router=partial(VQRouter, vq=vq)),
        layer_number=1,
    ).double()
    with torch.no_grad():
        layer.router.assigner.codebook.codes.copy_(parameters["assigner.codebook.codes"])
        for number in ("1", "2"):
            name = f"experts.weight{number}"
            weight = expert_slice(name, parameters[name])
            if experts == "grouped":
                getattr(layer.experts, f"weight{number}").copy_(weight)
            else:
                for expert, own in zip(layer.experts.local_experts, weight, strict=True):
                    getattr(expert, f"linear_fc{number}").weight.copy_(own)
    return layer


def gradients(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients under VQMoELayer's names, whatever kind of layer this is."""
    found = {}
    for name, parameter in layer.named_parameters():
        name = name.removeprefix("router.")
        if ".local_experts." in name:
            number = 1 if "linear_fc1" in name else 2
            found.setdefault(f"experts.weight{number}", []).append(parameter.grad)
        else:
            found[name] = parameter.grad
    return {n: torch.stack(g) if isinstance(g, list) else g for n, g in found.items()}


def both_layers(settings: dict, dispatcher: str, experts: str) -> dict:
    vq = VQConfig(**settings)
    parameters = draw_parameters(vq, bias=False)
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    x = torch.randn(6, 2, HIDDEN, generator=generator, dtype=torch.float64)
    weights = torch.randn(6, 2, HIDDEN, generator=generator, dtype=torch.float64)
    found = {}
    for name, layer in {
        "ours": build_layer(vq, parameters, add_bias_linear=False),
        "megatron": megatron_layer(vq, parameters, dispatcher, experts),
    }.items():
        own = x.clone().requires_grad_()
        output, _ = layer(own)
        (output * weights).sum().backward()
        found[name] = {"output": output.detach(), "x": own.grad, **gradients(layer)}
    return found


@pytest.mark.parametrize("experts", ["grouped", "sequential"])
@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_agrees_with_the_layer(ranks, layout: str, dispatcher: str, experts: str) -> None:  # noqa: ANN001
    check_agreement(ranks, *LAYOUTS[layout], dispatcher, experts)


@pytest.mark.parametrize("experts", ["grouped", "sequential"])
def test_agrees_with_the_layer_on_sharded_experts(ranks, experts: str) -> None:  # noqa: ANN001
    """All-gather only: Megatron's all-to-all dispatcher gathers unequal shares, gloo cannot."""
    check_agreement(ranks, 4, EP2_ETP2, "allgather", experts)


def check_agreement(ranks, world_size: int, sizes: dict, dispatcher: str, experts: str) -> None:  # noqa: ANN001
    # Across ranks, Megatron's all-gather dispatcher adds expert outputs in the fp32 of the weights.
    tolerance = 1e-6 if dispatcher == "allgather" and world_size > 1 else 1e-12
    for found in ranks(world_size).run(both_layers, BASE, dispatcher, experts, layout=sizes):
        assert set(found["ours"]) == set(found["megatron"])
        width = FFN // sizes.get("expert_tensor_parallel_size", 1)
        assert found["ours"]["experts.weight1"].shape[1:] == (width, HIDDEN)
        for name, value in found["ours"].items():
            torch.testing.assert_close(
                value,
                found["megatron"][name],
                rtol=tolerance,
                atol=tolerance,
                msg=lambda text, name=name: f"{name}: {text}",
            )


@pytest.mark.parametrize("num_slices", [2, 4])
def test_codes_of_one_token_on_one_expert_are_merged(ranks, num_slices: int) -> None:  # noqa: ANN001
    """The weights are fp32, as a router's are, so 1 / sqrt(2) is exact to 1e-8 only."""
    settings = {**BASE, "quantizer": "product", "num_code_slices": num_slices, "num_codes": 8}
    (found,) = ranks(1).run(both_layers, settings, "alltoall", "grouped")
    for name, value in found["ours"].items():
        torch.testing.assert_close(
            value,
            found["megatron"][name],
            rtol=1e-6,
            atol=1e-6,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def probabilities(settings: dict) -> dict:
    from vqmoe_megatron.moe import VQRouter

    router = VQRouter(transformer_config(), vq=VQConfig(**settings))
    router.set_layer_number(1)
    x = torch.randn(10, 2, HIDDEN)
    probs, routing_map = router(x)
    codes = router.assigner.codebook.search(x.view(-1, HIDDEN))
    return {"probs": probs.detach(), "map": routing_map, "codes": codes}


def test_probabilities_count_codes_per_expert(ranks) -> None:  # noqa: ANN001
    settings = {**BASE, "quantizer": "product", "num_code_slices": 4, "num_codes": 8}
    (found,) = ranks(1).run(probabilities, settings)
    expected = torch.zeros(20, NUM_EXPERTS)
    for t, codes in enumerate(found["codes"].tolist()):
        for c, code in enumerate(codes):
            expected[t, (8 * c + code) % NUM_EXPERTS] += 0.5
    assert torch.equal(found["probs"], expected)
    assert torch.equal(found["map"], expected > 0)
    assert (expected > 0.5).any()  # some token did have two codes on one expert


def refusals() -> list[str]:
    from vqmoe_megatron.moe import VQRouter

    messages = []
    for expert_input in ("code", "blend", "blend_convex"):
        try:
            VQRouter(transformer_config(), vq=VQConfig(expert_input=expert_input))
        except ValueError as error:
            messages.append(str(error))
    two_codes = VQConfig(expert_input="token", quantizer="product", num_code_slices=2)
    for changes in ({"moe_token_dispatcher_type": "flex"}, {"moe_permute_fusion": True}):
        config = transformer_config()
        for name, value in changes.items():  # the config itself refuses both without their kernels
            setattr(config, name, value)
        try:
            VQRouter(config, vq=two_codes)
        except ValueError as error:
            messages.append(str(error))
    try:
        VQRouter(transformer_config())(torch.zeros(2, 2, HIDDEN), torch.ones(2, 2))
    except ValueError as error:
        messages.append(str(error))
    return messages


def test_refuses_what_megatrons_dispatchers_cannot_carry(ranks) -> None:  # noqa: ANN001
    (messages,) = ranks(1).run(refusals)
    assert len(messages) == 6
    assert all("expert_input=token" in message for message in messages[:3])
    assert all("num_code_slices=2" in message for message in messages[3:5])
    assert "no padding mask" in messages[5]
