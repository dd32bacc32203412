"""Gather and reduce-scatter of rows on an expert-tensor group, by their numbers.

Rank e holds rows numbered 100 e, 100 e + 1, ...; E = 4 ranks, sizes unequal and zero among them.
"""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.distributed

ETP4 = {"expert_tensor_parallel_size": 4}


def exchange(sizes: list[int]) -> dict:
    """In a rank: gather, multiply by rank + 1, return the sum of all ranks; differentiate both."""
    from megatron.core import parallel_state

    from vqmoe_megatron.moe.expert_tensor_exchange import gather_rows, reduce_scatter_rows

    group = parallel_state.get_expert_tensor_parallel_group()
    rank = group.rank()
    own = 100.0 * rank + torch.arange(sizes[rank], dtype=torch.float64)
    own = torch.stack([own, -own], dim=1).requires_grad_()  # [R_e, H = 2]
    gathered = gather_rows(own, sizes, group)
    partial = (rank + 1) * gathered
    partial.retain_grad()
    returned = reduce_scatter_rows(partial, sizes, group)
    (returned * own.detach()).sum().backward()
    return {
        "gathered": gathered.detach(),
        "returned": returned.detach(),
        "partial gradient": partial.grad,
        "gradient": own.grad,
    }


@pytest.mark.parametrize("sizes", [[2, 2, 2, 2], [3, 0, 1, 5], [0, 0, 4, 0], [0, 0, 0, 0]])
def test_rows_go_and_return(ranks, sizes: list[int]) -> None:  # noqa: ANN001
    everything = [torch.arange(size, dtype=torch.float64) + 100 * e for e, size in enumerate(sizes)]
    everything = [torch.stack([rows, -rows], dim=1) for rows in everything]
    for rank, found in enumerate(ranks(4).run(exchange, sizes, layout=ETP4)):
        assert torch.equal(found["gathered"], torch.cat(everything))
        assert torch.equal(found["returned"], 10 * everything[rank])  # 1 + 2 + 3 + 4
        assert torch.equal(found["partial gradient"], torch.cat(everything))
        assert torch.equal(found["gradient"], 10 * everything[rank])
