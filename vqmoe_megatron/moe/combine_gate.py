"""The combine gate: how much of each path reaches the output.

T tokens, H hidden size.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.moe.norms import mark_sequence_parallel


class CombineGate(torch.nn.Module):
    """softmax: p_c y_c + p_d y_d (arXiv 2411.19402, section 3.2); sigmoid: y_c + s y_d.

    ``vq.combine_bias`` is the initial logit in favour of the continuous path. Started at one half,
    the discrete path starves the continuous one before its router has learned.
    """

    def __init__(self, config: TransformerConfig, vq: VQConfig) -> None:
        super().__init__()
        self.is_softmax = vq.combine == "softmax"
        bias = [vq.combine_bias, 0.0] if self.is_softmax else [-vq.combine_bias]
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

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Weights of the continuous path (None: one) and of the discrete path for tokens [T, H].

        ``[T]`` each, fp32 (fp64 for fp64). No communication.
        """
        logits = self.linear(x)
        if logits.dtype not in (torch.float32, torch.float64):
            logits = logits.float()
        if not self.is_softmax:
            return None, logits.sigmoid().squeeze(1)
        p = logits.softmax(dim=-1)
        return p[:, 0], p[:, 1]


def weighted_sum(
    y_continuous: torch.Tensor,
    y_discrete: torch.Tensor,
    weights: tuple[torch.Tensor | None, torch.Tensor],
) -> torch.Tensor:
    """``[T, H]`` outputs of both paths -> ``[T, H]`` in the dtype of the first."""
    p_continuous, p_discrete = weights
    first = y_continuous if p_continuous is None else p_continuous.unsqueeze(1) * y_continuous
    return (first + p_discrete.unsqueeze(1) * y_discrete).to(y_continuous.dtype)
