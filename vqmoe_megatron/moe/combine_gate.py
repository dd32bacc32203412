"""The combine: how much of each path reaches the output, and their sum.

T tokens, H hidden size, n paths.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.moe.norms import mark_sequence_parallel
from vqmoe_megatron.moe.part import Part

Weights = tuple[torch.Tensor | None, ...]  # of each path [T], fp32 (fp64); None: one


class CombineGate(torch.nn.Module):
    """softmax: p_c y_c + p_d y_d (arXiv 2411.19402, section 3.2); sigmoid: y_c + s y_d.

    ``vq.combine_bias`` is the initial logit in favour of the first, the continuous path. Started at
    one half, the discrete path starves the continuous one before its router has learned. Further
    paths are weighed like the second.
    """

    def __init__(self, config: TransformerConfig, vq: VQConfig, num_paths: int = 2) -> None:
        super().__init__()
        self.is_softmax = vq.combine == "softmax"
        others = num_paths - 1
        bias = (
            [vq.combine_bias] + others * [0.0] if self.is_softmax else others * [-vq.combine_bias]
        )
        self.linear = torch.nn.Linear(
            config.hidden_size,
            len(bias),
            dtype=config.params_dtype,
            device=torch.cuda.current_device(),
        )
        if config.perform_initialization:
            config.init_method(self.linear.weight)
        with torch.no_grad():
            self.linear.bias.copy_(torch.tensor(bias))
        mark_sequence_parallel(self, config)

    def forward(self, x: torch.Tensor) -> Weights:
        """Weights of n paths for tokens ``[T, H]``; for sigmoid the first has none.

        ``[T]`` each, fp32 (fp64 for fp64). No communication.
        """
        logits = self.linear(x)
        if logits.dtype not in (torch.float32, torch.float64):
            logits = logits.float()
        if not self.is_softmax:
            return None, *logits.sigmoid().unbind(dim=1)
        return logits.softmax(dim=-1).unbind(dim=1)


class OnePath(torch.nn.Module):
    """The gate of a layer with one path, whose weight is one."""

    def forward(self, x: torch.Tensor) -> Weights:
        """One weight, which is none."""
        return (None,)


def weighted_sum(parts: Sequence[Part], weights: Weights) -> torch.Tensor:
    """Parts of n paths -> ``[T, H]`` in the dtype of the first. Communicates as the parts do."""
    output, p_first = parts[0].value(), weights[0]
    for part, p in zip(parts[1:], weights[1:], strict=True):
        output = part.added_to(output, p_first, p)
        p_first = None
    return output
