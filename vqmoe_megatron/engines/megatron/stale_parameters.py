"""Bring parameters up to date before anything but training reads them."""

from __future__ import annotations

import torch


def gather_parameters(model: list[torch.nn.Module]) -> None:
    """Gather what an overlapped distributed optimizer has updated but not yet distributed.

    With ``overlap_param_gather`` the updated shards travel with the next forward pass; until then a
    rank holds stale values of the others' shards. Communicates over the data-parallel groups, and
    not at all without the overlap.
    """
    for chunk in model:
        ddp_config = getattr(chunk, "ddp_config", None)  # other engines have none
        if ddp_config is not None and ddp_config.overlap_param_gather:
            chunk.disable_forward_pre_hook(param_sync=True)
            chunk.enable_forward_pre_hook()
