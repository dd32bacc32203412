"""Equal shares of ranks, joined."""

from __future__ import annotations

import torch


def gathered(values: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """Equal shares of all ranks, joined along the first axis; one all-gather over ``group``."""
    if group.size() == 1:
        return values
    whole = values.new_empty(group.size() * values.shape[0], *values.shape[1:])
    torch.distributed.all_gather_into_tensor(whole, values.contiguous(), group=group)
    return whole
