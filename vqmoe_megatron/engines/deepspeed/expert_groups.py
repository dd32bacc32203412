"""Tell DeepSpeed which parameters are experts', and which ranks hold replicas of them.

DeepSpeed takes every parameter for a replica of one weight, copies the first rank's to all and
averages gradients over all ranks, unless a layer of its own kind is in the model and the parameter
says which registered group of experts it belongs to. Megatron's layer is not of that kind: untold,
experts of different ranks become one, without a word.
"""

from __future__ import annotations

import torch
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from megatron.core import parallel_state


class ExpertGroups(MoE):
    """What DeepSpeed looks for in a model with experts: no parameters, only their groups."""

    def __init__(self, num_experts: int, ep_size: int) -> None:
        torch.nn.Module.__init__(self)
        self.num_experts, self.ep_size = num_experts, ep_size
        self.expert_group_name = group_name(ep_size)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Make DeepSpeed's groups, and see that they are Megatron's.

        Communicates: over the world, as every new group does.

        Raises:
            ValueError: when they hold other ranks.
        """
        if self.expert_group_name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(self.ep_size)
        name = self.expert_group_name
        pairs = (
            (
                groups._get_expert_parallel_group(name),
                parallel_state.get_expert_model_parallel_group(),
            ),
            (
                groups._get_expert_data_parallel_group(name),
                parallel_state.get_expert_data_parallel_group(),
            ),
        )
        for theirs, ours in pairs:
            ranks = [torch.distributed.get_process_group_ranks(group) for group in (theirs, ours)]
            if ranks[0] != ranks[1]:
                raise ValueError(
                    f"DeepSpeed puts the experts of this rank on the ranks {ranks[0]}, Megatron on "
                    f"{ranks[1]}; use train.engine=megatron"
                )


def group_name(ep_size: int) -> str:
    """How DeepSpeed names the groups of experts over so many ranks."""
    return f"ep_size_{ep_size}"


def mark_experts(model: torch.nn.Module, ep_size: int) -> None:
    """Let the experts' parameters name their group. No communication."""
    for parameter in model.parameters():
        if not getattr(parameter, "allreduce", True):
            parameter.group_name = group_name(ep_size)
