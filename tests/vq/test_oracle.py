"""Facts of the method that can be seen on the oracle alone, by hand-made numbers.

That the distributed layer equals the oracle is tested in ``tests/moe/test_layer_equality.py``.
"""

from __future__ import annotations

import pytest
import torch
from tiny_layer import HIDDEN, NUM_EXPERTS, draw_parameters

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.vq.oracle import vqmoe_oracle


def settings(**changes: object) -> VQConfig:
    base = {"num_codes": 10, "codebook_update": "gradient", "init": "uniform", "norm": "none"}
    return VQConfig(**{**base, **changes})


def linear_experts(vq: VQConfig) -> dict[str, torch.Tensor]:
    """Experts that multiply by e + 1, so that an output shows its expert and its input."""
    parameters = draw_parameters(vq, bias=False)
    eye = torch.eye(HIDDEN, dtype=torch.float64)
    parameters["experts.weight1"] = torch.stack([(e + 1) * eye for e in range(NUM_EXPERTS)])
    parameters["experts.weight2"] = torch.stack([eye] * NUM_EXPERTS)
    return parameters


def tokens(num_tokens: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(num_tokens, HIDDEN, generator=generator, dtype=torch.float64)


def run(x: torch.Tensor, parameters: dict, vq: VQConfig, **options: object):  # noqa: ANN201
    return vqmoe_oracle(
        x, parameters, vq, num_experts=NUM_EXPERTS, activation=lambda h: h, **options
    )


@pytest.mark.parametrize(
    ("expert_input", "value", "jacobian"),
    [
        ("code", (0.0, 1.0), 1.0),
        ("blend", (1 - 2 * 0.3, 0.3), 1 - 0.3),
        ("blend_convex", (1 - 0.3, 0.3), 1.0),
        ("token", (1.0, 0.0), 1.0),
    ],
)
def test_expert_inputs(expert_input: str, value: tuple[float, float], jacobian: float) -> None:
    vq = settings(path="discrete", expert_input=expert_input, contribution_rate=0.3)
    parameters = linear_experts(vq)
    x = tokens(1).requires_grad_()
    result = run(x, parameters, vq)
    code, expert = int(result.codes), int(result.experts)
    assert expert == code % NUM_EXPERTS
    v = parameters["assigner.codebook.codes"][0, code]
    expected = (expert + 1) * (value[0] * x + value[1] * v)
    torch.testing.assert_close(result.output, expected)
    derivative = torch.autograd.functional.jacobian(
        lambda token: run(token, parameters, vq).output, x
    ).view(HIDDEN, HIDDEN)
    eye = torch.eye(HIDDEN, dtype=torch.float64)
    torch.testing.assert_close(derivative, (expert + 1) * jacobian * eye)


def test_codes_are_the_nearest_and_experts_their_remainder() -> None:
    vq = settings(path="discrete")
    parameters = linear_experts(vq)
    x = tokens(40)
    result = run(x, parameters, vq)
    nearest = torch.cdist(x, parameters["assigner.codebook.codes"][0]).argmin(dim=1)
    assert torch.equal(result.codes[:, 0], nearest)
    assert torch.equal(result.experts, result.codes % NUM_EXPERTS)


def test_a_given_code_map_replaces_the_remainder() -> None:
    vq = settings(path="discrete")
    parameters = linear_experts(vq)
    parameters["assigner.code_map.expert_of_row"] = torch.full((10,), 3)
    assert run(tokens(), parameters, vq).experts.unique().tolist() == [3]


def test_product_slices_sit_in_their_own_place_on_their_own_experts() -> None:
    vq = settings(path="discrete", quantizer="product", num_code_slices=2, num_codes=5)
    parameters = linear_experts(vq)
    result = run(tokens(1), parameters, vq)
    (first, second), codes = result.codes[0].tolist(), parameters["assigner.codebook.codes"]
    experts = [first % NUM_EXPERTS, (5 + second) % NUM_EXPERTS]
    assert result.experts[0].tolist() == experts
    halves = [(experts[0] + 1) * codes[0, first], (experts[1] + 1) * codes[1, second]]
    torch.testing.assert_close(result.output[0], torch.cat(halves) / 2**0.5)


def test_top_k_and_softmax_order_of_the_continuous_path() -> None:
    vq = settings(path="continuous")
    parameters = linear_experts(vq)
    parameters["router.weight"] = torch.zeros(NUM_EXPERTS, HIDDEN, dtype=torch.float64)
    parameters["router.bias"] = torch.tensor([1.0, 3.0, 2.0, 0.0], dtype=torch.float64)
    x = tokens(1)
    e = parameters["router.bias"].exp()
    before = run(x, parameters, vq, topk=2).output
    torch.testing.assert_close(before, (2 * e[1] + 3 * e[2]) / e.sum() * x, rtol=1e-6, atol=1e-6)
    after = run(x, parameters, vq, topk=2, pre_softmax=False).output
    expected = (2 * e[1] + 3 * e[2]) / (e[1] + e[2]) * x
    torch.testing.assert_close(after, expected, rtol=1e-6, atol=1e-6)


def test_router_gets_no_gradient_when_softmax_sees_one_selected_logit() -> None:
    vq = settings(path="continuous")
    parameters = linear_experts(vq)
    parameters["router.weight"].requires_grad_()
    run(tokens(), parameters, vq, pre_softmax=False).output.square().sum().backward()
    assert not parameters["router.weight"].grad.any()
    run(tokens(), parameters, vq, pre_softmax=True).output.square().sum().backward()
    assert parameters["router.weight"].grad.any()


@pytest.mark.parametrize("combine", ["softmax", "sigmoid"])
def test_combine_by_hand(combine: str) -> None:
    parts = {}
    parameters = linear_experts(settings(combine=combine))
    for path in ("continuous", "discrete", "dual"):
        parts[path] = run(tokens(1), parameters, settings(combine=combine, path=path)).output
    weight, bias = parameters["gate.linear.weight"], parameters["gate.linear.bias"]
    logits = tokens(1) @ weight.t() + bias
    if combine == "softmax":
        p = logits.softmax(dim=1)
        expected = p[:, :1] * parts["continuous"] + p[:, 1:] * parts["discrete"]
    else:
        expected = parts["continuous"] + logits.sigmoid() * parts["discrete"]
    torch.testing.assert_close(parts["dual"], expected)


@pytest.mark.parametrize("expert_input", ["code", "blend", "blend_convex", "token"])
def test_the_task_never_moves_the_codebook_and_the_vq_loss_does(expert_input: str) -> None:
    vq = settings(expert_input=expert_input)
    parameters = draw_parameters(vq)
    codes = parameters["assigner.codebook.codes"].requires_grad_()
    x = tokens().requires_grad_()
    result = run(x, parameters, vq)
    (task,) = torch.autograd.grad(result.output.sum(), codes, allow_unused=True, retain_graph=True)
    assert task is None or not task.any()
    (gradient,) = torch.autograd.grad(result.vq_loss, codes)
    assert gradient.any()


def test_vq_loss_is_the_weighted_sum_of_its_two_parts() -> None:
    vq = settings(vq_loss_coeff=0.5, commitment_coeff=0.25)
    parameters = draw_parameters(vq)
    x = tokens()
    result = run(x, parameters, vq)
    v = parameters["assigner.codebook.codes"][0, result.codes[:, 0]]
    mean = (x - v).square().mean()
    torch.testing.assert_close(result.commitment_loss, mean)
    torch.testing.assert_close(result.vq_loss, 0.5 * (mean + 0.25 * mean))


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_norms_are_torchs(normalization: str) -> None:
    vq = settings(path="discrete", norm="separate", expert_input="token")
    parameters = draw_parameters(vq, normalization=normalization) | {
        name: value for name, value in linear_experts(vq).items() if name.startswith("experts.w")
    }
    for name in ("experts.bias1", "experts.bias2"):
        del parameters[name]
    modules = {}
    for name in ("input_norm", "output_norm"):
        modules[name] = getattr(torch.nn, normalization)(HIDDEN, eps=1e-5, dtype=torch.float64)
        state = {
            key.removeprefix(f"{name}."): value
            for key, value in parameters.items()
            if key.startswith(name)
        }
        modules[name].load_state_dict(state)
    x = tokens(3)
    result = run(x, parameters, vq, normalization=normalization)
    rows = modules["input_norm"](x) * (result.experts + 1)
    torch.testing.assert_close(result.output, modules["output_norm"](rows))
