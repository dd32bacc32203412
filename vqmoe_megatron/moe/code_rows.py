"""Where every code row is evaluated: the owner rank of its expert, in a slot of fixed place.

C code slices, K codes, N experts, P expert-parallel ranks, n = N / P local experts. Row ids are
``slice * K + code`` in ``[0, C * K)``.

Every rank has the same number S of slots: the most rows that any rank owns. Slot j of rank p is
slot ``p * S + j`` of the table; a rank's rows lie in its first slots sorted by (expert, row), and
what is left over stands for its last row once more, which no token ever looks up. So all shapes are
equal and known beforehand: nothing is counted, exchanged or read on the host during training.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CodeRows:
    """This rank's rows, and where every row's output lies."""

    local_rows: torch.Tensor  # int64 [S], row ids in this rank's slots
    rows_per_local_expert: torch.Tensor  # int64 [n], summing to S
    expert_of_slot: torch.Tensor  # int64 [S], local expert of each slot
    slot_of_row: torch.Tensor  # int64 [C * K], in [0, P * S)
    num_ranks: int  # P
    rows_per_expert: int | None  # S / n where all local experts have equally many slots

    @property
    def num_local_slots(self) -> int:
        """S."""
        return self.local_rows.numel()

    @property
    def num_slots(self) -> int:
        """P * S."""
        return self.num_ranks * self.num_local_slots


def place_code_rows(
    expert_of_row: torch.Tensor, num_experts: int, num_ranks: int, rank: int
) -> CodeRows:
    """Place C * K rows in the slots of P ranks.

    Args:
        expert_of_row: int64 ``[C * K]``, the code map.
        num_experts: N, a multiple of P.
        num_ranks: P.
        rank: this rank, in ``[0, P)``.

    Reads the map on the host once. No communication; equal maps give equal places on all ranks.
    """
    experts = expert_of_row.cpu()
    num_local_experts = num_experts // num_ranks
    order = torch.argsort(experts, stable=True)  # rows by (expert, row)
    rows_of_rank = torch.bincount(experts // num_local_experts, minlength=num_ranks)
    num_slots = int(rows_of_rank.max())
    first = rows_of_rank.cumsum(0) - rows_of_rank
    owner = (experts // num_local_experts)[order]
    slot_of_row = torch.empty_like(order)
    slot_of_row[order] = owner * num_slots + torch.arange(order.numel()) - first[owner]

    own = order[first[rank] : first[rank] + rows_of_rank[rank]]
    spare = num_slots - own.numel()
    last_row = own[-1:] if own.numel() else order[:1]
    local_rows = torch.cat([own, last_row.expand(spare)])
    local_experts = experts[own] - rank * num_local_experts
    last_expert = local_experts[-1:] if own.numel() else torch.tensor([num_local_experts - 1])
    local_experts = torch.cat([local_experts, last_expert.expand(spare)])
    device = expert_of_row.device
    counts = torch.bincount(local_experts, minlength=num_local_experts)
    is_even = bool((counts == counts[0]).all())
    return CodeRows(
        local_rows=local_rows.to(device),
        rows_per_local_expert=counts.to(device),
        expert_of_slot=local_experts.to(device),
        slot_of_row=slot_of_row.to(device),
        num_ranks=num_ranks,
        rows_per_expert=int(counts[0]) if is_even else None,
    )
