"""Which tokens a tensor-parallel rank offers to replace dead codes."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import pytest
import torch

from vqmoe_megatron.moe.candidates import candidate_places


def places(
    num_candidates: int, num_local_tokens: int, rank: int, num_ranks: int
) -> list[list[int]]:
    """[slots, positions] of one rank."""
    group = SimpleNamespace(rank=lambda: rank, size=lambda: num_ranks)
    found = candidate_places(num_candidates, num_local_tokens, group, torch.device("cpu"))
    return [part.tolist() for part in found]


@pytest.mark.parametrize(("num_candidates", "num_ranks"), product((1, 3, 8, 13, 96), (1, 2, 3, 4)))
def test_candidate_j_is_the_token_at_j_times_t_over_m(num_candidates: int, num_ranks: int) -> None:
    for num_local_tokens in (1, 2, 5, 7, 64):
        wanted: list[list[list[int]]] = [[[], []] for _ in range(num_ranks)]
        for j in range(num_candidates):
            position = j * num_local_tokens * num_ranks // num_candidates
            owner, local = divmod(position, num_local_tokens)
            wanted[owner][0].append(j)
            wanted[owner][1].append(local)
        assert [
            places(num_candidates, num_local_tokens, rank, num_ranks) for rank in range(num_ranks)
        ] == wanted
