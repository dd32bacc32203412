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

    def forward(
        self, x: torch.Tensor, y_continuous: torch.Tensor, y_discrete: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``([T, H] output, [T, 1] weight of the discrete path)``. No communication."""
        logits = self.linear(x)
        if logits.dtype not in (torch.float32, torch.float64):
            logits = logits.float()
        if not self.is_softmax:
            weight = logits.sigmoid()
            return (y_continuous + weight * y_discrete).to(x.dtype), weight
        p = logits.softmax(dim=-1)
        return (p[:, :1] * y_continuous + p[:, 1:] * y_discrete).to(x.dtype), p[:, 1:]
