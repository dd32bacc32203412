"""What the experts of the discrete path are fed, and which gradient goes back to the token.

T tokens, C codes per token, H hidden size, D = H / C, c the contribution rate, sg() stop-gradient.

code          v                       dx by vq.straight_through
blend         (1 - c) x + c sg(v - x)  as released: value (1 - 2c) x + c v, Jacobian (1 - c) I
blend_convex  (1 - c) x + c (x + sg(v - x)): value (1 - c) x + c v, Jacobian I
token         x                        the codes choose the experts and nothing else

With C > 1 a token has C rows. For ``code`` row s is the code vector of slice s in its own place and
zeros elsewhere; for the other inputs every row is the same full vector.
"""

from __future__ import annotations

import torch

from vqmoe_megatron.config import VQConfig


class _StraightThrough(torch.autograd.Function):
    """The code's value exactly (x + sg(v - x) would round), the token's gradient."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, quantized: torch.Tensor):  # noqa: ANN001, ANN205
        return quantized.clone()

    @staticmethod
    def backward(ctx, grad: torch.Tensor):  # noqa: ANN001, ANN205
        return grad, None


def discrete_input(x: torch.Tensor, quantized: torch.Tensor, vq: VQConfig) -> torch.Tensor:
    """Build the expert inputs of the discrete path.

    Args:
        x: ``[T, H]`` tokens in the codebook's space.
        quantized: ``[T, H]`` their code vectors; no gradient ever reaches them from here.
        vq: names the form.

    Returns:
        ``[T, C, H]`` in the dtype of ``x``. No communication.
    """
    num_slices = vq.num_code_slices
    quantized = quantized.detach().to(x.dtype)
    rate = vq.contribution_rate
    if vq.expert_input == "code":
        if vq.straight_through == "token":
            quantized = _StraightThrough.apply(x, quantized)
        if num_slices == 1:
            return quantized.unsqueeze(1)
        slices = quantized.view(x.shape[0], 1, num_slices, -1)
        own_place = torch.eye(num_slices, dtype=x.dtype, device=x.device)
        return (own_place[None, :, :, None] * slices).view(x.shape[0], num_slices, -1)
    if vq.expert_input == "blend":
        mixed = (1 - rate) * x + rate * (quantized - x).detach()
    elif vq.expert_input == "blend_convex":
        mixed = x + rate * (quantized - x).detach()
    else:
        mixed = x
    return mixed.unsqueeze(1).expand(-1, num_slices, -1)
