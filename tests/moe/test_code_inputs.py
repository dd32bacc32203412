"""What the experts of code rows are fed: learned vectors, or code vectors in their places."""

from __future__ import annotations

import pytest
import torch
from tiny_layer import HIDDEN, transformer_config

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.moe.code_inputs import (
    CodebookInputs,
    LearnedCodeInputs,
    code_vectors_in_place,
)
from vqmoe_megatron.vq.codebook import Codebook, build_codebook

PRODUCT = {"quantizer": "product", "num_code_slices": 4, "num_codes": 3}
TP2 = {"tensor_model_parallel_size": 2}


def learned(settings: dict, dtype: str, layer_number: int, seed: int) -> dict:
    """In a rank: a layer's learned vectors, its marks, rows 2 5 2, and their gradient."""
    config = transformer_config(params_dtype=getattr(torch, dtype))
    vq = VQConfig(code_input="learned", **settings)
    inputs = LearnedCodeInputs(config, vq, Codebook(vq, HIDDEN, seed), seed)
    inputs.set_layer_number(layer_number)
    rows = inputs(torch.tensor([2, 5, 2]))
    rows.float().sum().backward()
    return {
        "vectors": inputs.vectors.detach(),
        "rows": rows.detach(),
        "gradient": inputs.vectors.grad,
        "is_sequence_parallel": inputs.vectors.sequence_parallel,
        "trained": [name for name, p in inputs.named_parameters() if p.requires_grad],
    }


@pytest.mark.distributed
def test_learned_vectors_have_full_width_and_the_tasks_gradient(ranks) -> None:  # noqa: ANN001
    (found,) = ranks(1).run(learned, PRODUCT, "float32", 1, 7)
    vectors = found["vectors"]
    assert vectors.shape == (4, 3, HIDDEN) and found["trained"] == ["vectors"]
    assert torch.equal(found["rows"], vectors.flatten(0, 1)[[2, 5, 2]])
    expected = torch.zeros_like(vectors)
    expected[0, 2], expected[1, 2] = 2.0, 1.0
    assert torch.equal(found["gradient"], expected)


@pytest.mark.distributed
def test_learned_vectors_start_from_a_standard_normal(ranks) -> None:  # noqa: ANN001
    (found,) = ranks(1).run(learned, {"num_codes": 1000}, "float32", 1, 7)
    assert abs(float(found["vectors"].mean())) < 0.03
    assert abs(float(found["vectors"].std()) - 1.0) < 0.03


@pytest.mark.distributed
def test_the_start_depends_on_layer_and_seed_and_on_nothing_else(ranks) -> None:  # noqa: ANN001
    def vectors(world: int, *args: object, **layout: int) -> list[torch.Tensor]:
        return [r["vectors"] for r in ranks(world).run(learned, {}, *args, layout=layout)]

    (alone,) = vectors(1, "float32", 3, 7)
    (other_layer,) = vectors(1, "float32", 4, 7)
    (other_seed,) = vectors(1, "float32", 3, 8)
    (half,) = vectors(1, "bfloat16", 3, 7)
    assert torch.equal(half, alone.bfloat16())
    for other in (other_layer, other_seed):
        assert float((other == alone).float().mean()) < 0.01
    for replica in vectors(2, "float32", 3, 7, **TP2):
        assert torch.equal(replica, alone)


@pytest.mark.distributed
def test_replicas_over_tensor_ranks_are_marked_for_their_reduction(ranks) -> None:  # noqa: ANN001
    (alone,) = ranks(1).run(learned, {}, "float32", 1, 7)
    assert alone["is_sequence_parallel"] is False
    for found in ranks(2).run(learned, {}, "float32", 1, 7, layout=TP2):
        assert found["is_sequence_parallel"] is True


def codebook(**settings: object) -> Codebook:
    vq = VQConfig(codebook_update="gradient", init="uniform", **settings)
    book = build_codebook(vq, HIDDEN, seed=3)
    with torch.no_grad():
        book.codes.copy_(torch.randn(book.codes.shape, generator=torch.Generator().manual_seed(0)))
    return book


def test_a_single_slice_gives_the_code_vectors_themselves() -> None:
    book = codebook(num_codes=5)
    rows = code_vectors_in_place(book, torch.tensor([4, 0, 4]))
    assert torch.equal(rows, book.codes[0, [4, 0, 4]]) and not rows.requires_grad


def test_slices_stand_in_their_place_with_zeros_elsewhere() -> None:
    book = codebook(**PRODUCT)
    wanted = torch.tensor([0, 11, 4, 7, 0])  # slices 0 3 1 2 0, codes 0 2 1 1 0
    rows = code_vectors_in_place(book, wanted)
    expected = torch.zeros(5, HIDDEN)
    for i, row in enumerate(wanted.tolist()):
        c, k = divmod(row, 3)
        expected[i, 4 * c : 4 * c + 4] = book.codes[c, k].detach()
    assert torch.equal(rows, expected) and not rows.requires_grad


def test_cosine_codes_have_the_length_of_tokens() -> None:
    book = codebook(quantizer="cosine", num_codes=5)
    rows = code_vectors_in_place(book, torch.arange(5))
    torch.testing.assert_close(rows.norm(dim=1), torch.full((5,), HIDDEN**0.5))
    torch.testing.assert_close(
        torch.cosine_similarity(rows, book.codes[0], dim=1), torch.ones(5), rtol=1e-5, atol=1e-6
    )


def test_codes_of_a_low_dimensional_space_are_lifted() -> None:
    book = codebook(quantizer="low_dim", code_dim=3, num_codes=5)
    rows = code_vectors_in_place(book, torch.tensor([4, 0]))
    assert rows.shape == (2, HIDDEN) and not rows.requires_grad
    torch.testing.assert_close(rows, book.codes[0, [4, 0]] @ book.projection)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{"num_codes": 6}, PRODUCT], ids=["one slice", "product"])
def test_tokens_send_what_code_space_evaluates(settings: dict, dtype: torch.dtype) -> None:
    """A token's rows are the rows of its codes: exact, in their own slices, without gradient."""
    book = codebook(**settings)
    codes = torch.tensor([[0, 2, 1, 1], [2, 2, 0, 1], [1, 0, 0, 2]])[:, : book.num_slices]
    ids = torch.arange(book.num_slices) * book.num_codes + codes
    inputs = CodebookInputs(book)
    rows = inputs.of_tokens(codes, ids, dtype)
    assert rows.shape == (3, book.num_slices, HIDDEN)
    assert rows.dtype == dtype and not rows.requires_grad
    assert torch.equal(rows, inputs(ids.reshape(-1)).view_as(rows).to(dtype))
    assert rows.any(dim=2).all()
