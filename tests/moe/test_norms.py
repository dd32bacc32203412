"""Norms for rows of another dtype than their weights; their input gradients at looked-up rows."""

from __future__ import annotations

import pytest
import torch
from tiny_layer import transformer_config

from vqmoe_megatron.moe import norms
from vqmoe_megatron.moe.norms import ParallelNorm

HIDDEN = 8
KINDS = ["LayerNorm", "RMSNorm"]


def norm(kind: str, dtype: torch.dtype) -> torch.nn.Module:
    module = getattr(norms, kind)(HIDDEN, eps=1e-5, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(1 + torch.randn(HIDDEN, generator=generator))
    return module


def rows(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return 3 * torch.randn(*shape, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_the_norms_dtype_are_its_own_business(kind: str) -> None:
    module, x = norm(kind, torch.float32), rows(2, 5, dtype=torch.float32)
    torchs = getattr(torch.nn, kind)(HIDDEN, eps=1e-5)
    torchs.load_state_dict(module.state_dict())
    assert torch.equal(module(x), torchs(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("weights", "of_rows"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)]
)
def test_rows_of_another_dtype_are_normed_in_theirs(
    kind: str, weights: torch.dtype, of_rows: torch.dtype
) -> None:
    module, x = norm(kind, weights), rows(5, dtype=of_rows).requires_grad_()
    exact = norm(kind, weights).to(of_rows)  # the same weights, widened
    y, expected = module(x), exact(x)
    assert y.dtype == of_rows and torch.equal(y, expected)
    grad = rows(5, dtype=of_rows).flip(0)
    (ours,) = torch.autograd.grad(y, x, grad, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected, x, grad, retain_graph=True)
    assert torch.equal(ours, theirs)
    y.backward(grad)
    expected.backward(grad)
    for found, wanted in zip(module.parameters(), exact.parameters(), strict=True):
        assert found.dtype == weights  # unchanged by the call
        assert torch.equal(found.grad, wanted.grad.to(weights))  # rounded once, as a sum


@pytest.mark.parametrize("of_rows", [torch.bfloat16, torch.float32])
def test_weights_that_arrive_in_a_forward_pre_hook_are_the_ones_used(of_rows: torch.dtype) -> None:
    """Megatron's overlapped parameter gather writes a module's weights in such a hook."""
    module, fresh = (norm("LayerNorm", torch.bfloat16) for _ in range(2))
    weight = module.weight

    def receive(*_: object) -> None:
        weight.data.fill_(2.0)

    module.register_forward_pre_hook(receive)
    fresh.weight.data.fill_(2.0)
    x = rows(5, dtype=of_rows)
    assert torch.equal(module(x), fresh.to(of_rows)(x))


@pytest.mark.parametrize("kind", KINDS)
def test_input_gradient_at_looked_up_rows(kind: str) -> None:
    module, table = norm(kind, torch.float64), rows(4)
    ids = torch.tensor([3, 0, 0, 2, 3, 3])
    grads = rows(6)
    inputs = table[ids].requires_grad_()
    (expected,) = torch.autograd.grad(module(inputs), inputs, grads)
    with torch.no_grad():
        found = module.input_gradient(table, ids, grads)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    assert not found.requires_grad
    assert all(parameter.grad is None for parameter in module.parameters())


def test_input_gradient_is_taken_in_the_dtype_of_the_gradients() -> None:
    module, table = norm("LayerNorm", torch.bfloat16), rows(4, dtype=torch.bfloat16)
    ids = torch.tensor([1, 3, 1])
    grads = rows(3, dtype=torch.float32)
    found = module.input_gradient(table, ids, grads)
    expected = module.double().input_gradient(table.double(), ids, grads.double())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_no_rows_have_no_gradients() -> None:
    no_ids = torch.zeros(0, dtype=torch.int64)
    found = norm("RMSNorm", torch.float32).input_gradient(rows(4), no_ids, rows(0))
    assert found.shape == (0, HIDDEN)


def built(kind: str) -> dict:
    """In a rank: what ParallelNorm builds, or its refusal."""
    config = transformer_config(params_dtype=torch.bfloat16)
    config.normalization = kind
    try:
        module = ParallelNorm(config, HIDDEN, 1e-3, has_residual=True)
    except ValueError as error:
        return {"refusal": str(error)}
    return {
        "kind": type(module).__name__,
        "eps": module.eps,
        "dtype": str(module.weight.dtype),
        "marks": [p.sequence_parallel for p in module.parameters()],
    }


@pytest.mark.distributed
@pytest.mark.parametrize("kind", KINDS)
def test_parallel_norm_is_torchs_and_marked_under_sequence_parallelism(ranks, kind: str) -> None:  # noqa: ANN001
    num_parameters = 2 if kind == "LayerNorm" else 1
    expected = {"kind": kind, "eps": 1e-3, "dtype": "torch.bfloat16"}
    assert ranks(1).run(built, kind) == [{**expected, "marks": [False] * num_parameters}]
    for found in ranks(2).run(built, kind, layout={"tensor_model_parallel_size": 2}):
        assert found == {**expected, "marks": [True] * num_parameters}


@pytest.mark.distributed
def test_an_unknown_normalization_is_refused(ranks) -> None:  # noqa: ANN001
    (found,) = ranks(1).run(built, "BatchNorm")
    assert "normalization='BatchNorm': choose one of LayerNorm, RMSNorm" in found["refusal"]
