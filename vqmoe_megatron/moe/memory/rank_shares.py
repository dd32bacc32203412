"""Equal shares of ranks: joined, and of a rank's tokens."""

from __future__ import annotations

import torch


def spread(num_tokens: int, num_places: int, device: torch.device) -> torch.Tensor:
    """Evenly spread positions int64 ``[num_places]``."""
    return torch.arange(num_places, device=device) * num_tokens // num_places


def gathered(values: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """Equal shares of all ranks, joined along the first axis; one all-gather over ``group``."""
    if group.size() == 1:
        return values
    whole = values.new_empty(group.size() * values.shape[0], *values.shape[1:])
    torch.distributed.all_gather_into_tensor(whole, values.contiguous(), group=group)
    return whole
