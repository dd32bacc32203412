"""The gradient that a token gets although the expert saw its code instead.

T tokens, C code slices, H hidden size, P * S slots of the table, G_t the gradient of a token's
table row, J_k the Jacobian of row k's expert at row k (with the norms around it).

token     dx_t = sum_c J_c^T G_t: exact, as if the experts had seen x; the gradients travel
group     dx_t = sum_c J_c^T (mean of G over the tokens of row c); one row per code travels
identity  dx_t = dL/dy_t: the layer taken for the identity
none      nothing

With code_input=codebook row c stands in the place of slice c, and the token gets the columns of
that slice; a learned row has full width, and so has the token's gradient. ``group`` means over the
tokens of one microbatch of one data-parallel replica, wherever its tensor- and context-parallel
parts lie, so that it does not depend on the layout.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vqmoe_megatron.vq.codebook import Codebook
from vqmoe_megatron.vq.segment_sum import count_ids, segment_sum


def spent_gradient(grad: torch.Tensor) -> torch.Tensor:
    """Stands where a gradient was taken: it let go of the table it held.

    Raises:
        RuntimeError: always, as torch does for saved tensors.
    """
    raise RuntimeError("backward a second time: the gradient to the tokens is gone after the first")


class _OwnGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: torch.Tensor, x: torch.Tensor, gradient: Callable):  # noqa: ANN001, ANN205
        ctx.gradient, ctx.dtype = gradient, x.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):  # noqa: ANN001, ANN205
        # Megatron keeps a microbatch's output, and with it this node, until the next one is there.
        gradient, ctx.gradient = ctx.gradient, spent_gradient
        dx = gradient(grad) if ctx.needs_input_grad[1] else None
        return grad, dx, None


def with_gradient_to(
    y: torch.Tensor, x: torch.Tensor, gradient: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Return ``y``; its gradient g also gives ``x`` the gradient ``gradient(g)``."""
    return _OwnGradient.apply(y, x, gradient)


def input_gradient_to_token(
    rows: torch.Tensor,
    x: torch.Tensor,
    codes: torch.Tensor,
    mode: str,
    is_sliced: bool,
    codebook: Codebook,
    parts_group: torch.distributed.ProcessGroup,
) -> torch.Tensor:
    """Token dispatch: return the code rows ``[T, C, H]``, whose gradient also reaches the tokens.

    Args:
        rows: ``[T, C, H]`` expert inputs.
        x: ``[T, H]`` tokens in the codebook's space.
        codes: int64 ``[T, C]``.
        mode: of vq.straight_through; identity and none change nothing here.
        is_sliced: row c stands in the place of slice c, and the token gets those columns of its
            gradient; else it gets the sum of the rows' gradients.
        codebook: brings gradients of hidden vectors into its space.
        parts_group: tp_cp, for mode group; its ranks hold parts of one sequence.

    Communicates over ``parts_group`` one all-reduce in the backward pass, for mode group.
    """
    if mode not in ("token", "group"):
        return rows

    def gradient(grad: torch.Tensor) -> torch.Tensor:
        if mode == "group":
            means = [
                mean_over_tokens(grad[:, c], codes[:, c : c + 1], codebook.num_codes, parts_group)[
                    codes[:, c]
                ]
                for c in range(codes.shape[1])
            ]
            grad = torch.stack(means, dim=1).to(grad.dtype)
        if not is_sliced or grad.shape[1] == 1:
            return codebook.lower(grad.sum(dim=1))
        slices = grad.unflatten(2, (grad.shape[1], -1))  # [T, C rows, C slices, D]
        return slices.diagonal(dim1=1, dim2=2).transpose(1, 2).flatten(1)

    return with_gradient_to(rows, x, gradient)


def mean_over_tokens(
    grad: torch.Tensor,
    ids: torch.Tensor,
    num_ids: int,
    parts_group: torch.distributed.ProcessGroup,
) -> torch.Tensor:
    """Mean gradient of each id over its tokens of the microbatch; zero for ids without any.

    Args:
        grad: ``[T, H]``.
        ids: int64 ``[T, C]``.
        num_ids: R.
        parts_group: tp_cp; its ranks hold parts of one sequence (in training,
            sequence parallel).

    Returns:
        ``[R, H]`` in fp32 (fp64 for fp64). Communicates over ``parts_group`` one all-reduce.
    """
    sums = sum(segment_sum(grad, ids[:, c], num_ids) for c in range(ids.shape[1]))
    counts = count_ids(ids.reshape(-1), num_ids).to(sums.dtype)
    both = torch.cat([sums, counts.unsqueeze(1)], dim=1)
    if parts_group.size() > 1:
        torch.distributed.all_reduce(both, group=parts_group)
    return both[:, :-1] / both[:, -1:].clamp(min=1.0)
