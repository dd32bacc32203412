"""A DeepSpeed run whose experts are not registered, to show that the registration is needed."""

from __future__ import annotations

from unittest import mock

from small_run import train_here


def train_without_registration(recipe: str, overrides: list[str]) -> dict:
    """As ``train_here``; DeepSpeed is told nothing of experts and takes them for dense weights."""
    import torch

    from vqmoe_megatron.engines.deepspeed import expert_groups

    class Unregistered(torch.nn.Module):
        def __init__(self, num_experts: int, ep_size: int) -> None:
            super().__init__()

    def leave_as_dense(model: torch.nn.Module, ep_size: int) -> None:
        for parameter in model.parameters():
            parameter.allreduce = True

    with (
        mock.patch.object(expert_groups, "ExpertGroups", Unregistered),
        mock.patch.object(expert_groups, "mark_experts", leave_as_dense),
    ):
        return train_here(recipe, overrides)
