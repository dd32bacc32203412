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


def row_of(result, num_codes: int) -> torch.Tensor:  # noqa: ANN001
    """Each token's row ids [T, C]."""
    return result.codes + num_codes * torch.arange(result.codes.shape[1])


@pytest.mark.parametrize("num_slices", [1, 2])
@pytest.mark.parametrize("straight_through", ["token", "group", "identity", "none"])
def test_learned_inputs_stand_in_for_codes_and_get_the_tasks_gradient(
    straight_through: str, num_slices: int
) -> None:
    product = {"quantizer": "product", "num_code_slices": num_slices} if num_slices > 1 else {}
    vq = settings(
        path="discrete", code_input="learned", straight_through=straight_through, **product
    )
    parameters = linear_experts(vq)
    learned = parameters["code_inputs.vectors"].requires_grad_()
    result = run(tokens(), parameters, vq)
    rows = row_of(result, vq.num_codes)
    by_codes = run(tokens(), parameters, settings(path="discrete", **product))
    assert torch.equal(result.codes, by_codes.codes)
    of_row = learned.detach().flatten(0, -2)
    factors = (rows % NUM_EXPERTS + 1).double() / num_slices**0.5
    expected = (factors.unsqueeze(2) * of_row[rows]).sum(dim=1)
    torch.testing.assert_close(result.output.detach(), expected)

    g = torch.randn(expected.shape, dtype=torch.float64)
    result.output.backward(g)
    gradient = torch.zeros_like(of_row)
    for t, of_token in enumerate(rows.tolist()):
        for c, row in enumerate(of_token):
            gradient[row] += factors[t, c] * g[t]
    torch.testing.assert_close(learned.grad.view_as(gradient), gradient)


def finite_difference(function, at: torch.Tensor, direction: torch.Tensor) -> float:  # noqa: ANN001
    step = 1e-6 * direction
    with torch.no_grad():
        return float(function(at + step) - function(at - step)) / 2e-6


def test_the_gradient_of_learned_inputs_by_finite_differences() -> None:
    vq = settings(code_input="learned", norm="separate", vq_loss_coeff=0.0)
    parameters = draw_parameters(vq)
    vectors = parameters["code_inputs.vectors"].clone()
    direction = torch.randn_like(vectors)

    def loss(learned: torch.Tensor) -> torch.Tensor:
        changed = {**parameters, "code_inputs.vectors": learned}
        return vqmoe_oracle(tokens(), changed, vq, num_experts=NUM_EXPERTS).output.square().sum()

    (gradient,) = torch.autograd.grad(loss(vectors.requires_grad_()), vectors)
    expected = finite_difference(loss, vectors.detach(), direction)
    assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("code_input", ["codebook", "learned"])
def test_a_token_gets_the_gradient_of_an_expert_input_in_its_place(code_input: str) -> None:
    """dx = J^T g with J at the expert's input: by finite differences of that input."""
    vq = settings(path="discrete", norm="separate", code_input=code_input)
    parameters = draw_parameters(vq)
    x, g = tokens(1).requires_grad_(), torch.randn(HIDDEN, dtype=torch.float64)
    result = vqmoe_oracle(x, parameters, vq, num_experts=NUM_EXPERTS)
    (dx,) = torch.autograd.grad((result.output * g).sum(), x)
    name = {"codebook": "assigner.codebook.codes", "learned": "code_inputs.vectors"}[code_input]
    of_row = parameters[name].view(-1, HIDDEN)[int(result.codes)].clone()
    direction = torch.randn(HIDDEN, dtype=torch.float64)
    # expert_input=token with the row as the only token is the expert at the row, norms and all
    at_row = settings(path="discrete", norm="separate", expert_input="token")
    one_expert = torch.full((vq.num_codes,), int(result.experts))
    fixed = {**parameters, "assigner.code_map.expert_of_row": one_expert}

    def loss(row: torch.Tensor) -> torch.Tensor:
        y = vqmoe_oracle(row.view(1, -1), fixed, at_row, num_experts=NUM_EXPERTS).output
        return (y * g).sum()

    torch.testing.assert_close(loss(of_row), (result.output * g).sum().detach())
    expected = finite_difference(loss, of_row, direction)
    assert float((dx[0] * direction).sum()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("code_input", ["codebook", "learned"])
@pytest.mark.parametrize("replicas", [None, [0, 0, 0, 1, 1, 1]])
def test_a_group_shares_the_mean_gradient_of_its_cell(
    code_input: str, replicas: list[int] | None
) -> None:
    vq = settings(path="discrete", straight_through="group", code_input=code_input, num_codes=2)
    parameters = linear_experts(vq)
    x = tokens(6).requires_grad_()
    result = run(x, parameters, vq, replicas=replicas)
    codes = result.codes[:, 0].tolist()
    assert set(codes) == {0, 1}
    g = torch.randn(6, HIDDEN, dtype=torch.float64)
    (dx,) = torch.autograd.grad(result.output, x, g)
    places = replicas or [0] * 6
    for t in range(6):
        cell = [u for u in range(6) if (places[u], codes[u]) == (places[t], codes[t])]
        expected = (codes[t] + 1) * torch.stack([g[u] for u in cell]).mean(dim=0)
        torch.testing.assert_close(dx[t], expected)


def test_the_slices_of_a_token_are_in_groups_of_their_own() -> None:
    vq = settings(
        path="discrete",
        straight_through="group",
        quantizer="product",
        num_code_slices=2,
        num_codes=2,
    )
    parameters = linear_experts(vq)
    x = tokens(6).requires_grad_()
    result = run(x, parameters, vq)
    g = torch.randn(6, HIDDEN, dtype=torch.float64)
    (dx,) = torch.autograd.grad(result.output, x, g)
    rows = row_of(result, 2)
    half = HIDDEN // 2
    for t in range(6):
        for c, columns in enumerate((slice(0, half), slice(half, HIDDEN))):
            cell = rows[:, c] == rows[t, c]
            factor = (int(rows[t, c]) % NUM_EXPERTS + 1) / 2**0.5
            torch.testing.assert_close(dx[t, columns], factor * g[cell][:, columns].mean(dim=0))
