"""The two VQ losses: values, which side each gradient reaches, precision, and what is kept.

T = 30 tokens, C slices of K = 5 codes, H = 12.
"""

from __future__ import annotations

import pytest
import torch

from vqmoe_megatron.vq.losses import look_up_codes, quantization_losses

NUM_TOKENS, NUM_CODES, HIDDEN = 30, 5, 12


def drawn(
    num_slices: int, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens [T, H] and vectors [C, K, H / C] that want gradients, and ids [T, C]; id 3 is free."""
    generator = torch.Generator().manual_seed(num_slices)
    x = torch.randn(NUM_TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    vectors = torch.randn(
        num_slices, NUM_CODES, HIDDEN // num_slices, generator=generator, dtype=torch.float64
    )
    ids = torch.randint(NUM_CODES - 1, (NUM_TOKENS, num_slices), generator=generator)
    ids = torch.where(ids == 3, 4, ids)
    return x.to(dtype).requires_grad_(), vectors.to(dtype).requires_grad_(), ids


def formula(
    x: torch.Tensor, vectors: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, by autograd."""
    num_slices = vectors.shape[0]
    v = torch.stack([torch.cat([vectors[c, t[c]] for c in range(num_slices)]) for t in ids])
    return (x - v.detach()).square().mean(), (x.detach() - v).square().mean()


@pytest.mark.parametrize("num_slices", [1, 3])
def test_values_are_means_over_all_elements(num_slices: int) -> None:
    x, vectors, ids = drawn(num_slices)
    expected = 0.0
    for t in range(NUM_TOKENS):
        for h in range(HIDDEN):
            c, d = divmod(h, HIDDEN // num_slices)
            expected += float((x[t, h] - vectors[c, ids[t, c], d]) ** 2)
    for loss in quantization_losses(x, vectors, ids):
        assert loss.shape == ()
        assert float(loss) == pytest.approx(expected / (NUM_TOKENS * HIDDEN), rel=1e-13)


@pytest.mark.parametrize("num_slices", [1, 3])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.25, 1.0), (-3.0, 0.5)])
def test_gradients_are_those_of_the_formula(num_slices: int, weights: tuple[float, float]) -> None:
    x, vectors, ids = drawn(num_slices)
    gradients = []
    for losses in (quantization_losses(x, vectors, ids), formula(x, vectors, ids)):
        total = weights[0] * losses[0] + weights[1] * losses[1]
        gradients.append(torch.autograd.grad(total, (x, vectors)))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-15)
    assert bool(gradients[0][0].any()) is bool(weights[0])  # of commitment alone
    assert bool(gradients[0][1].any()) is bool(weights[1])  # of the codebook loss alone
    assert not gradients[0][1][:, 3].any()  # a code without tokens


@pytest.mark.parametrize("wants", ["x", "vectors"])
def test_only_what_wants_a_gradient_gets_one(wants: str) -> None:
    x, vectors, ids = drawn(3)
    x.requires_grad_(wants == "x")
    vectors.requires_grad_(wants == "vectors")
    commitment, codebook = quantization_losses(x, vectors, ids)
    (commitment + codebook).backward()
    expected_x, expected_vectors, _ = drawn(3)
    sum(formula(expected_x, expected_vectors, ids)).backward()
    for tensor, expected in ((x, expected_x), (vectors, expected_vectors)):
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, expected.grad, rtol=1e-13, atol=1e-15)
        else:
            assert tensor.grad is None


def test_one_loss_alone_may_be_differentiated() -> None:
    x, vectors, ids = drawn(1)
    quantization_losses(x, vectors, ids)[1].backward()
    expected_x, expected_vectors, _ = drawn(1)
    formula(expected_x, expected_vectors, ids)[1].backward()
    torch.testing.assert_close(vectors.grad, expected_vectors.grad, rtol=1e-13, atol=1e-15)
    assert x.grad is None or not x.grad.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_slices", [1, 3])
def test_nothing_is_kept_but_tokens_vectors_and_ids(dtype: torch.dtype, num_slices: int) -> None:
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    inputs = drawn(num_slices, dtype)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        quantization_losses(*inputs)
    assert [tensor.data_ptr() for tensor in kept] == [tensor.data_ptr() for tensor in inputs]


def test_inputs_are_left_as_they_were() -> None:
    inputs = drawn(3)
    before = [tensor.detach().clone() for tensor in inputs]
    commitment, codebook = quantization_losses(*inputs)
    (commitment + codebook).backward(retain_graph=True)
    first = [tensor.grad.clone() for tensor in inputs[:2]]
    (commitment + codebook).backward()  # again, from the same kept tensors
    for tensor, value in zip(inputs, before, strict=True):
        assert torch.equal(tensor, value)
    for tensor, gradient in zip(inputs[:2], first, strict=True):
        assert torch.equal(tensor.grad, 2 * gradient)


def test_bf16_tokens_are_measured_in_fp32() -> None:
    x = torch.ones(1, 4, dtype=torch.bfloat16).requires_grad_()
    vectors = torch.full((1, 2, 4), 1.0 + 2**-10).requires_grad_()
    commitment, codebook = quantization_losses(x, vectors, torch.tensor([[1]]))
    assert commitment.dtype == codebook.dtype == torch.float32
    assert float(commitment) == float(codebook) == 2**-20
    (commitment + codebook).backward()
    assert x.grad.dtype == torch.bfloat16 and vectors.grad.dtype == torch.float32
    assert x.grad.unique().tolist() == [-(2**-11)]  # 2 (x - v) / 4
    assert vectors.grad[0].tolist() == [[0.0] * 4, [2**-11] * 4]


def test_fp64_tokens_are_measured_in_fp64() -> None:
    x, vectors, ids = drawn(1)
    loss, _ = quantization_losses(x, vectors.float(), ids)
    assert loss.dtype == torch.float64


@pytest.mark.parametrize("num_slices", [1, 3])
def test_codes_are_looked_up_slice_by_slice(num_slices: int) -> None:
    _, vectors, ids = drawn(num_slices)
    found = look_up_codes(vectors, ids)
    for t in range(NUM_TOKENS):
        for c, part in enumerate(found[t].chunk(num_slices)):
            assert torch.equal(part, vectors[c, ids[t, c]])
    found.sum().backward()
    for c in range(num_slices):
        counts = torch.bincount(ids[:, c], minlength=NUM_CODES).double()
        assert torch.equal(vectors.grad[c], counts[:, None].expand_as(vectors[c]))
