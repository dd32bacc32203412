"""Rows spread evenly over the ranks of the experts, whatever the tokens are.

R rows, N destinations (experts, or slots of the code table), P expert-parallel ranks.

How many rows travel depends on the data, and a plan cannot know it; a plan assumes balance. With
this routing a run on real ranks has exactly the balance that the plan assumes, and a simulated
rank, which has no data, has the same. Row j goes to rank j mod P. What the model learns under it
means nothing; what it sends does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from megatron.core import parallel_state

from vqmoe_megatron.moe import code_space, layer
from vqmoe_megatron.vq.permutation import PermutationPlan, plan_permutation


@contextmanager
def balanced_routing() -> Iterator[None]:
    """Send every MoE layer's rows to all ranks of its expert-parallel group equally.

    Raises:
        ValueError: in a forward pass whose rows do not divide by the ranks.

    No communication of its own.
    """
    with (
        mock.patch.object(layer, "plan_permutation", _balanced_plan),
        mock.patch.object(code_space, "plan_permutation", _balanced_plan),
    ):
        yield


def _balanced_plan(
    ids: torch.Tensor, num_ids: int, order_within: torch.Tensor | None = None
) -> PermutationPlan:
    num_ranks = parallel_state.get_expert_model_parallel_world_size()
    num_rows = ids.numel()
    if num_rows % num_ranks:
        raise ValueError(
            f"balanced routing: rows % EP != 0: {num_rows} % {num_ranks} = "
            f"{num_rows % num_ranks}; choose a micro batch and a sequence length that divide"
        )
    per_rank = num_ids // num_ranks
    row = torch.arange(num_rows, device=ids.device)
    return plan_permutation(
        row % num_ranks * per_rank + row // num_ranks % per_rank, num_ids, order_within
    )
