"""The modules of a discrete path, as its executions share them.

T tokens, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.moe.code_assigner import Assignment, CodeAssigner
from vqmoe_megatron.moe.code_inputs import ExpertCodeInputs
from vqmoe_megatron.moe.straight_through import with_gradient_to


@dataclass(frozen=True)
class DiscreteParts:
    """Codebook, expert inputs and norms. The layer owns the modules."""

    vq: VQConfig
    assigner: CodeAssigner
    code_inputs: ExpertCodeInputs
    input_norm: torch.nn.Module  # of expert inputs
    output_norm: torch.nn.Module  # of the path's output; the same module for norm=shared
    parts_group: torch.distributed.ProcessGroup  # tp_cp: its ranks hold parts of sequences

    @property
    def modules(self) -> tuple[torch.nn.Module | ExpertCodeInputs, ...]:
        """What has parameters of its own, but for the assigner."""
        return self.input_norm, self.output_norm, self.code_inputs

    def finish(self, y: torch.Tensor, assignment: Assignment) -> torch.Tensor:
        """``[T, H]`` scaled sums of expert outputs -> normed, with the identity's gradient.

        No communication.
        """
        y = self.output_norm(y)
        if self.vq.straight_through == "identity" and self.vq.expert_input == "code":
            y = with_gradient_to(y, assignment.prepared, self.assigner.codebook.lower)
        return y
