"""The filled path by hand-made numbers: experts that multiply by e + 1, so a sum shows them."""

from __future__ import annotations

import pytest
import torch

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.vq.fill_oracle import filled_output

TOKEN = torch.tensor([1.0, -2.0], dtype=torch.float64)
CODE = torch.tensor([10.0, 20.0], dtype=torch.float64)
P = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
DISTANCE = 2.0  # scores 1.0, 0.4, 0.6


def evaluate(topk: int = 1, tau: float | None = None, rows: torch.Tensor | None = None, **fill):  # noqa: ANN201
    vq = VQConfig(path="filled", **fill)
    settings = (CODE, DISTANCE, rows, vq, topk, tau)
    return filled_output(TOKEN, P.log(), lambda e, row: (e + 1) * row, *settings)


@pytest.mark.parametrize(
    ("settings", "of_token", "of_code"),
    [
        ({}, 0.5, 0.4 + 0.9),
        ({"topk": 2}, 0.5 + 0.9, 0.4),
        ({"num_fill_experts": 2}, 0.5, 0.9),
        ({"num_fill_experts": 1}, 0.5, 0.0),
        ({"threshold_routing": True}, 0.5, 0.4 + 0.9),  # not set: the most likely
        ({"threshold_routing": True, "tau": 0.5}, 0.5 + 0.9, 0.4),
        ({"threshold_routing": True, "tau": 0.5, "num_fill_experts": 0}, 0.5 + 0.9, 0.0),
        ({"threshold_routing": True, "tau": 2.0, "num_fill_experts": 2}, 0.0, 0.5 + 0.9),
        ({"threshold_routing": True, "tau": 2.0, "num_fill_experts": 0}, 0.0, 0.0),
    ],
)
def test_a_sum_over_exact_and_filled_experts(settings: dict, of_token: float, of_code: float):
    y, _ = evaluate(**settings)
    torch.testing.assert_close(y, of_token * TOKEN + of_code * CODE)


def test_the_experts_that_saw_the_token_are_named() -> None:
    assert evaluate(topk=2)[1] == [0, 2]
    assert evaluate(threshold_routing=True, tau=0.3)[1] == [0, 1, 2]
    assert evaluate(threshold_routing=True, tau=3.0)[1] == []


def test_learned_rows_stand_in_the_place_of_outputs() -> None:
    rows = torch.tensor([[7.0, 7.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    y, _ = evaluate(rows=rows, fill_values="direct")
    torch.testing.assert_close(y, 0.5 * TOKEN + 0.2 * rows[1] + 0.3 * rows[2])
