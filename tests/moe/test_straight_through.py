"""Gradients that tokens get although the experts saw codes: by loops, and over tensor ranks."""

from __future__ import annotations

import weakref

import pytest
import torch

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.moe.straight_through import (
    input_gradient_to_token,
    mean_over_tokens,
    with_gradient_to,
)
from vqmoe_megatron.vq.codebook import Codebook, build_codebook

TP2 = {"tensor_model_parallel_size": 2}
NUM_TOKENS, HIDDEN, NUM_CODES = 12, 6, 5


def drawn(num_slices: int) -> dict[str, torch.Tensor]:
    """Tokens x [T, H], rows [T, C, H], their gradients and codes [T, C]; code 3 never occurs."""
    generator = torch.Generator().manual_seed(num_slices)
    shape = NUM_TOKENS, num_slices, HIDDEN
    codes = torch.randint(NUM_CODES - 1, shape[:2], generator=generator)
    return {
        "x": torch.randn(NUM_TOKENS, HIDDEN, generator=generator, dtype=torch.float64),
        "rows": torch.randn(shape, generator=generator, dtype=torch.float64),
        "grad": torch.randn(shape, generator=generator, dtype=torch.float64),
        "codes": torch.where(codes == 3, 4, codes),
    }


def means(grad: torch.Tensor, ids: torch.Tensor, num_ids: int) -> torch.Tensor:
    """By a loop: the mean of grad [T, H] over the tokens that have an id among their C ids."""
    found = torch.zeros(num_ids, grad.shape[1], dtype=grad.dtype)
    for i in range(num_ids):
        members = [grad[t] for t in range(ids.shape[0]) for c in ids[t].tolist() if c == i]
        if members:
            found[i] = torch.stack(members).mean(dim=0)
    return found


def test_value_and_own_gradient_stay_and_the_other_is_given() -> None:
    y = torch.randn(4, 3, requires_grad=True)
    x = torch.randn(4, 2, requires_grad=True)
    out = with_gradient_to(y, x, lambda grad: 7 * grad[:, :2])
    assert torch.equal(out, y)
    grad = torch.randn(4, 3)
    out.backward(grad)
    assert torch.equal(y.grad, grad) and torch.equal(x.grad, 7 * grad[:, :2])


def test_no_gradient_is_computed_for_a_token_that_needs_none() -> None:
    calls = []
    y = torch.randn(4, 3, requires_grad=True)
    with_gradient_to(y, torch.randn(4, 2), calls.append).sum().backward()
    assert calls == [] and torch.equal(y.grad, torch.ones(4, 3))


def test_a_gradient_is_taken_once_and_then_let_go() -> None:
    y, x = torch.randn(4, 3, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    table = torch.randn(2)
    held = weakref.ref(table)
    out = with_gradient_to(y, x, lambda grad, table=table: grad[:, :2] * table)
    del table
    out.backward(torch.ones(4, 3), retain_graph=True)
    assert held() is None
    with pytest.raises(RuntimeError, match="backward a second time"):
        out.backward(torch.ones(4, 3))


def test_a_value_without_gradient_still_passes_one() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    with_gradient_to(torch.randn(4, 3), x, lambda grad: grad).sum().backward()
    assert torch.equal(x.grad, torch.ones(4, 3))


def codebook(num_slices: int, code_dim: int | None = None) -> Codebook:
    """Of five codes; ``code_dim``: in a space of so many dimensions."""
    kind = "product" if num_slices > 1 else "euclidean" if code_dim is None else "low_dim"
    vq = VQConfig(
        num_codes=NUM_CODES, quantizer=kind, num_code_slices=num_slices, code_dim=code_dim
    )
    return build_codebook(vq, HIDDEN, seed=1).double()


def input_gradients(
    mode: str, is_sliced: bool, num_slices: int, code_dim: int | None = None
) -> dict:
    """In a rank: values and gradients of this tensor rank's share of the tokens."""
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    own = {name: part.chunk(group.size())[group.rank()] for name, part in drawn(num_slices).items()}
    x, rows = own["x"][:, :code_dim].clone().requires_grad_(), own["rows"].requires_grad_()
    book = codebook(num_slices, code_dim)
    out = input_gradient_to_token(rows, x, own["codes"], mode, is_sliced, book, group)
    out.backward(own["grad"])
    return {"value": out.detach(), "rows": rows.grad, "x": x.grad}


def check_input_gradients(found: list[dict], mode: str, is_sliced: bool, num_slices: int) -> None:
    parts = drawn(num_slices)
    assert torch.equal(torch.cat([f["value"] for f in found]), parts["rows"])
    assert torch.equal(torch.cat([f["rows"] for f in found]), parts["grad"])
    if mode in ("identity", "none"):
        assert [f["x"] for f in found] == [None] * len(found)
        return
    expected = torch.zeros(NUM_TOKENS, HIDDEN, dtype=torch.float64)
    for c in range(num_slices):
        grad = parts["grad"][:, c]
        if mode == "group":
            grad = means(grad, parts["codes"][:, c : c + 1], NUM_CODES)[parts["codes"][:, c]]
        width = HIDDEN // num_slices
        columns = slice(c * width, (c + 1) * width) if is_sliced else slice(None)
        expected[:, columns] += grad[:, columns]
    torch.testing.assert_close(torch.cat([f["x"] for f in found]), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.distributed
@pytest.mark.parametrize("num_slices", [1, 3])
@pytest.mark.parametrize("is_sliced", [True, False])
@pytest.mark.parametrize("mode", ["token", "group", "identity", "none"])
def test_expert_input_gradients_reach_the_token(
    ranks,  # noqa: ANN001
    mode: str,
    is_sliced: bool,
    num_slices: int,
) -> None:
    found = ranks(1).run(input_gradients, mode, is_sliced, num_slices)
    check_input_gradients(found, mode, is_sliced, num_slices)


@pytest.mark.distributed
@pytest.mark.parametrize("num_slices", [1, 3])
def test_the_means_of_a_group_reach_over_tensor_ranks(ranks, num_slices: int) -> None:  # noqa: ANN001
    found = ranks(2).run(input_gradients, "group", True, num_slices, layout=TP2)
    check_input_gradients(found, "group", True, num_slices)


@pytest.mark.distributed
@pytest.mark.parametrize("mode", ["token", "group"])
def test_tokens_of_a_low_dimensional_space_get_the_projected_gradient(ranks, mode: str) -> None:  # noqa: ANN001
    (full,) = ranks(1).run(input_gradients, mode, True, 1)
    (low,) = ranks(1).run(input_gradients, mode, True, 1, 2)
    projection = codebook(1, 2).projection  # [D, H]
    torch.testing.assert_close(low["x"], full["x"] @ projection.t(), rtol=1e-13, atol=1e-13)


def row_means(num_slices: int, dtype: str) -> torch.Tensor:
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    parts = {n: p.chunk(group.size())[group.rank()] for n, p in drawn(num_slices).items()}
    ids = parts["codes"] + NUM_CODES * torch.arange(num_slices)
    grad = parts["grad"][:, 0].to(getattr(torch, dtype))
    return mean_over_tokens(grad, ids, num_slices * NUM_CODES, group)


@pytest.mark.distributed
@pytest.mark.parametrize("num_slices", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2])
def test_means_of_every_row(ranks, num_slices: int, world_size: int) -> None:  # noqa: ANN001
    parts = drawn(num_slices)
    ids = parts["codes"] + NUM_CODES * torch.arange(num_slices)
    expected = means(parts["grad"][:, 0], ids, num_slices * NUM_CODES)
    assert not expected[3].any()  # a row without tokens
    layout = TP2 if world_size == 2 else {}
    for found in ranks(world_size).run(row_means, num_slices, "float64", layout=layout):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.distributed
def test_means_of_bf16_gradients_are_fp32(ranks) -> None:  # noqa: ANN001
    (found,) = ranks(1).run(row_means, 1, "bfloat16")
    parts = drawn(1)
    expected = means(parts["grad"][:, 0].bfloat16().double(), parts["codes"], NUM_CODES)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
