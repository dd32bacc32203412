"""Gradients of expert inputs at the code rows, for gradients of many tokens' outputs.

S slots of code rows on this rank, R' token rows sorted by slot, H hidden size, F expert hidden
size, n local experts, G = 2 for gated experts else 1.

A token's expert input was exactly its code row, so its gradient is J^T g with the Jacobian J of the
expert at that row. J needs the derivative of the activation at S rows only: nothing of the tokens'
own is ever kept, and the tokens cost two matrix products.
"""

from __future__ import annotations

import torch

from vqmoe_megatron.moe.code_rows import CodeRows
from vqmoe_megatron.moe.grouped_experts import GroupedExperts
from vqmoe_megatron.vq.segment_sum import count_ids


@torch.no_grad()
def expert_input_gradient(
    experts: torch.nn.Module,
    inputs: torch.Tensor,
    code_rows: CodeRows,
    slots: torch.Tensor,
    grads: torch.Tensor,
) -> torch.Tensor:
    """Return ``J_k^T g`` for every token row.

    Args:
        experts: of this rank. Those other than :class:`GroupedExperts` (Megatron's own) have no
            access to their activations: their forward pass is repeated on the token rows, twice
            the cost.
        inputs: ``[S, H]`` expert inputs of this rank's slots.
        code_rows: their places.
        slots: int64 ``[R']``, ascending slot of each token row.
        grads: ``[R', H]`` gradients of the token rows' expert outputs.

    Returns:
        ``[R', H]``; under expert tensor parallelism this shard's part. No communication.
    """
    tokens_per_expert = count_ids(
        code_rows.expert_of_slot[slots], code_rows.rows_per_local_expert.numel()
    )
    if not isinstance(experts, GroupedExperts):
        return _by_repetition(experts, inputs.index_select(0, slots), tokens_per_expert, grads)
    slopes = _activation_slopes(experts, inputs, code_rows).to(grads.dtype)  # [S, G F]
    at_hidden = experts.matmul(grads, experts.weight2.transpose(1, 2), tokens_per_expert)
    before = slopes.index_select(0, slots)  # [R', G F], becomes the gradient of fc1's outputs
    before.unflatten(1, (experts.num_halves, -1)).mul_(at_hidden.unsqueeze(1))
    return experts.matmul(before, experts.weight1.transpose(1, 2), tokens_per_expert)


def _activation_slopes(
    experts: GroupedExperts, inputs: torch.Tensor, code_rows: CodeRows
) -> torch.Tensor:
    """Expert inputs ``[S, H]`` -> ``[S, G F]``, the derivative of the activation's output by each
    output of fc1."""
    counts = code_rows.rows_per_local_expert
    hidden = experts.matmul(inputs, experts.weight1, counts, code_rows.rows_per_expert)
    hidden = experts.add_bias(hidden, experts.bias1, counts)
    with torch.enable_grad():
        hidden = hidden.detach().requires_grad_()
        activated = experts.activate(hidden)
    ones = activated.new_ones(()).expand_as(activated)  # one number in memory
    return torch.autograd.grad(activated, hidden, ones)[0]


def _by_repetition(
    experts: torch.nn.Module,
    rows: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    grads: torch.Tensor,
) -> torch.Tensor:
    weights = {name: parameter.detach() for name, parameter in experts.named_parameters()}
    with torch.enable_grad():
        rows = rows.detach().requires_grad_()
        ones = torch.ones(rows.shape[0], dtype=rows.dtype, device=rows.device)
        outputs, _ = torch.func.functional_call(experts, weights, (rows, tokens_per_expert, ones))
    return torch.autograd.grad(outputs, rows, grads)[0]
