"""Tables built before they are asked for: the same outputs and gradients, and where they are not.

Without CUDA the side stream is the current one; the order of the work is that of a GPU.
"""

from __future__ import annotations

import pytest
import torch
from collective_log import logged_collectives, names_of
from fast_path import BASE, CASES, both_ways, check
from tiny_layer import HIDDEN, build_layer, draw_parameters

from vqmoe_megatron.config import VQConfig

EP2 = {"expert_model_parallel_size": 2}


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_a_table_ahead_trains_like_a_table_in_turn(ranks, name: str) -> None:  # noqa: ANN001
    for plain, ahead in ranks(2).run(both_ways, CASES[name], True, layout=EP2):
        check(plain, ahead)


def gathered_before_the_layer() -> dict[str, list[int]]:
    """In a rank: all-gathers of :meth:`start_ahead` and of the pass behind it, by situation."""
    vq = VQConfig(**BASE, path="discrete", straight_through="none", overlap_table=True)
    layer = build_layer(vq, draw_parameters(vq))
    x = torch.randn(3, 2, HIDDEN, dtype=torch.float64)
    counts = {}
    for name, mode, grad, starts in (
        ("training", True, True, True),
        ("nobody starts it", True, True, False),
        ("no gradient", True, False, True),
        ("evaluation", False, False, True),
    ):
        layer.train(mode)
        with torch.set_grad_enabled(grad):
            with logged_collectives() as before:
                if starts:
                    layer.start_ahead()
            with logged_collectives() as inside:
                layer(x)
        counts[name] = [
            names_of(calls).count("all_gather_into_tensor") for calls in (before, inside)
        ]
    return counts


@pytest.mark.distributed
def test_who_gathers_the_table(ranks) -> None:  # noqa: ANN001
    for counts in ranks(2).run(gathered_before_the_layer, layout=EP2):
        assert counts.pop("training") == [1, 0]
        assert set(map(tuple, counts.values())) == {(0, 1)}
