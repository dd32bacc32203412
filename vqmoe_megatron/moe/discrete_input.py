"""What the experts of the discrete path are fed in token dispatch, and which gradient goes back.

T tokens, C codes per token, H hidden size, D = H / C, c the contribution rate, sg() stop-gradient.

code          v, or a learned vector   dx by vq.straight_through
blend         (1 - c) x + c sg(v - x)  as released: value (1 - 2c) x + c v, Jacobian (1 - c) I
blend_convex  (1 - c) x + c (x + sg(v - x)): value (1 - c) x + c v, Jacobian I
token         x                        the codes choose the experts and nothing else

With C > 1 a token has C rows. For ``code`` row s is the code vector of slice s in its own place and
zeros elsewhere (a learned one has full width); for the other inputs every row is the same vector.
"""

from __future__ import annotations

import torch

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.moe.code_assigner import Assignment
from vqmoe_megatron.moe.discrete_parts import DiscreteParts
from vqmoe_megatron.moe.straight_through import input_gradient_to_token


def mixed_input(x: torch.Tensor, quantized: torch.Tensor, vq: VQConfig) -> torch.Tensor:
    """Build the expert inputs that hold something of the token: blend, blend_convex, token.

    Args:
        x: ``[T, H]`` tokens in the codebook's space.
        quantized: ``[T, H]`` their code vectors; no gradient ever reaches them from here.
        vq: names the form.

    Returns:
        ``[T, C, H]`` in the dtype of ``x``. No communication.
    """
    rate = vq.contribution_rate
    quantized = quantized.detach().to(x.dtype)
    if vq.expert_input == "blend":
        mixed = (1 - rate) * x + rate * (quantized - x).detach()
    elif vq.expert_input == "blend_convex":
        mixed = x + rate * (quantized - x).detach()
    else:
        mixed = x
    return mixed.unsqueeze(1).expand(-1, vq.num_code_slices, -1)


def discrete_rows(x: torch.Tensor, assignment: Assignment, parts: DiscreteParts) -> torch.Tensor:
    """Build the C rows that every token sends to the experts, before the input norm.

    Args:
        x: ``[T, H]`` tokens.
        assignment: their codes.
        parts: of the path; its settings name the input and its gradient.

    Returns:
        ``[T, C, H]`` in the dtype of ``x``. Communicates over the tensor-parallel group in the
        backward pass, for straight_through=group.
    """
    vq, codebook = parts.vq, parts.assigner.codebook
    if vq.expert_input != "code":
        # The token as it came, also for cosine codes; a blend where distances are taken.
        is_raw = vq.expert_input == "token" or codebook.is_projected
        quantized = codebook.lift(codebook.lookup(assignment.codes))
        return mixed_input(x if is_raw else assignment.prepared, quantized, vq)
    return input_gradient_to_token(
        parts.code_inputs.of_tokens(assignment.codes, assignment.rows, x.dtype),
        assignment.prepared,
        assignment.codes,
        vq.straight_through,
        parts.code_inputs.is_sliced,
        codebook,
        parts.parts_group,
    )
