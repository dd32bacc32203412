"""The oracle's search by hand-made codes."""

from __future__ import annotations

import torch

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.vq.search_oracle import code_vectors, lifted, nearest, prepare

CODES = torch.tensor([[[3.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [-1.0, -1.0]]])  # [C 2, K 2, D 2]


def test_each_slice_has_its_nearest_code_and_ties_go_to_the_lowest() -> None:
    codes, vectors = nearest(torch.tensor([0.0, 0.0, 0.0, 0.0]), CODES)
    assert codes == [1, 0]  # slice 0: 9 and 1; slice 1: 2 and 2
    assert [v.tolist() for v in vectors] == [[0.0, 1.0], [1.0, 1.0]]


def test_cosine_codes_and_tokens_are_compared_at_one_length() -> None:
    vq, parameters = VQConfig(quantizer="cosine"), {"assigner.codebook.codes": CODES[:1]}
    vectors = code_vectors(parameters, vq)
    torch.testing.assert_close(vectors[0], torch.eye(2) * 2**0.5)
    ready = prepare(torch.tensor([0.1, 0.0]), parameters, vq)
    torch.testing.assert_close(ready, torch.tensor([2**0.5, 0.0]))
    assert nearest(ready, vectors)[0] == [0]


def test_low_dim_projects_and_lifts_by_the_transpose() -> None:
    parameters = {"assigner.codebook.projection": torch.tensor([[0.0, 1.0, 0.0]])}
    vq = VQConfig(quantizer="low_dim", code_dim=1)
    ready = prepare(torch.tensor([7.0, 2.0, 5.0]), parameters, vq)
    assert ready.tolist() == [2.0]
    assert lifted(ready, parameters, vq).tolist() == [0.0, 2.0, 0.0]
    assert lifted(ready, {}, VQConfig()) is ready
