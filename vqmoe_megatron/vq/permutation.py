"""The integer permutation plan: rows sorted by expert, then by code.

R rows (a token has one row per code or per selected expert), N experts.

An expert-parallel dispatch needs only two things: an order that makes every expert's rows
contiguous, and how many rows each expert gets. Both are integer vectors of length R and N; no
[T, N] map is built.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from vqmoe_megatron.vq.segment_sum import count_ids


@dataclass(frozen=True)
class PermutationPlan:
    """Where each row goes. ``order[i]`` is the source row of sorted row ``i``."""

    order: torch.Tensor  # int64 [R]
    tokens_per_expert: torch.Tensor  # int64 [N]

    @functools.cached_property
    def inverse(self) -> torch.Tensor:
        """int64 ``[R]``: the sorted position of each source row."""
        positions = torch.arange(self.order.numel(), device=self.order.device)
        return torch.empty_like(self.order).scatter_(0, self.order, positions)


def plan_permutation(
    expert_ids: torch.Tensor, num_experts: int, code_ids: torch.Tensor | None = None
) -> PermutationPlan:
    """Sort rows by ``(expert, code)``, keeping the source order among equals.

    Args:
        expert_ids: int64 ``[R]``, values in ``[0, num_experts)``.
        num_experts: N.
        code_ids: int64 ``[R]``, non-negative and below 2**31, or None to sort by expert alone.
            Rows of one code lie together, which gives the expert GEMM repeated rows and lets a
            reader of a trace see code usage.

    Returns:
        The plan; experts without rows have a count of zero.

    No communication, no host synchronisation.
    """
    key = expert_ids
    if code_ids is not None:
        key = (expert_ids << 31) + code_ids
    order = torch.argsort(key, stable=True)
    return PermutationPlan(order=order, tokens_per_expert=count_ids(expert_ids, num_experts))


def append_residents(
    plan: PermutationPlan, residents_per_expert: torch.Tensor, num_residents: int
) -> PermutationPlan:
    """Extend a plan by S rows that lie behind the R planned ones, already sorted by expert.

    Args:
        plan: of R rows over N experts.
        residents_per_expert: integer ``[N]``, summing to S.
        num_residents: S.

    Returns:
        The plan of all R + S rows; an expert's residents come behind its other rows.

    O(R + S), no sort. No communication, no host synchronisation.
    """
    device, num_rows = plan.order.device, plan.order.numel()
    experts = torch.arange(residents_per_expert.numel(), device=device)
    resident_expert = experts.repeat_interleave(residents_per_expert, output_size=num_residents)
    row_expert = experts.repeat_interleave(plan.tokens_per_expert, output_size=num_rows)
    rows_so_far = plan.tokens_per_expert.cumsum(0)
    residents_before = residents_per_expert.cumsum(0) - residents_per_expert
    order = torch.empty(num_rows + num_residents, dtype=torch.int64, device=device)
    order[torch.arange(num_rows, device=device) + residents_before[row_expert]] = plan.order
    behind = torch.arange(num_residents, device=device)
    order[behind + rows_so_far[resident_expert]] = num_rows + behind
    return PermutationPlan(order, plan.tokens_per_expert + residents_per_expert)
