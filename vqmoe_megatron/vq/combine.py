"""The combine of the dual path over a table of code outputs: gather, scale, add, and gradients.

T tokens, H hidden size, C codes per token, R rows of the table.

    out[t] = p_continuous[t] * y_continuous[t] + p_discrete[t] * scale * sum_c table[ids[t, c]]

The discrete output of a token is a sum of table rows, so it is never stored for all tokens. A
weight that is left out is one; without ``y_continuous`` only the discrete term remains. Sums are
taken in fp32, in fp64 when a tensor is fp64, and rounded once, into the result.

On CUDA a Triton kernel does each function (combine_triton.py). The plain torch here walks over the
tokens in blocks whose intermediates stay in a cache, so memory sees each [T, H] array once.

Autograd is left to the caller; so is the table's gradient, a sum over the tokens of each row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import embedding_bag

from vqmoe_megatron.vq.kernel_choice import use_kernel

BLOCK_ELEMENTS = 1 << 18  # of one intermediate: 1 MiB of fp32, the fastest of 2^14 to 2^30


def gather_scale_add(
    table: torch.Tensor,
    ids: torch.Tensor,
    scale: float = 1.0,
    y_continuous: torch.Tensor | None = None,
    p_continuous: torch.Tensor | None = None,
    p_discrete: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Return ``p_continuous * y_continuous + p_discrete * scale * sum_c table[ids[:, c]]``.

    Args:
        table: ``[R, H]``, any floating dtype.
        ids: int64 ``[T, C]`` in ``[0, R)``.
        scale: of the sum, for instance ``C**-0.5``.
        y_continuous: ``[T, H]``, any floating dtype; ``None`` leaves the term out.
        p_continuous: ``[T]``, any stride; ``None`` is one.
        p_discrete: as ``p_continuous``.
        dtype: of the result; by default that of ``y_continuous``, or else of ``table``.

    Returns:
        ``[T, H]`` of ``dtype``, without gradient.

    Raises:
        ValueError: when shapes or dtypes do not fit each other.
        RuntimeError: on the CPU, for a code outside the table; CUDA makes that token's row NaN.

    No communication, no host synchronisation.
    """
    _check(table, ids, y_continuous, p_continuous, p_discrete)
    if dtype is None:
        dtype = (table if y_continuous is None else y_continuous).dtype
    with torch.no_grad():
        if use_kernel(table, ids, y_continuous, p_continuous, p_discrete):
            from vqmoe_megatron.vq.combine_triton import gather_scale_add_triton

            return gather_scale_add_triton(
                table, ids, scale, y_continuous, p_continuous, p_discrete, dtype
            )
        exact = _sum_dtype(table, y_continuous, p_continuous, p_discrete)
        table = table.to(exact)
        factors = table.new_full(ids.shape, scale)  # of each row that is gathered
        if p_discrete is not None:
            factors *= p_discrete.unsqueeze(1)
        out = torch.empty(ids.shape[0], table.shape[1], dtype=dtype, device=table.device)
        for rows in _blocks(*out.shape):
            total = embedding_bag(ids[rows], table, mode="sum", per_sample_weights=factors[rows])
            if y_continuous is not None and p_continuous is None:
                total.add_(y_continuous[rows])
            elif y_continuous is not None:
                total.addcmul_(y_continuous[rows].to(exact), p_continuous[rows].unsqueeze(1))
            out[rows] = total
        return out


def gather_scale_add_backward(
    grad: torch.Tensor,
    table: torch.Tensor,
    ids: torch.Tensor,
    scale: float = 1.0,
    y_continuous: torch.Tensor | None = None,
    p_continuous: torch.Tensor | None = None,
    p_discrete: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of ``y_continuous``, ``p_continuous`` and ``p_discrete``.

    Args:
        grad: ``[T, H]`` gradient of the result, any floating dtype.
        table: as for ``gather_scale_add``, like all that follow.
        ids: int64 ``[T, C]``.
        scale: of the sum.
        y_continuous: ``[T, H]`` or ``None``.
        p_continuous: ``[T]`` or ``None``.
        p_discrete: ``[T]`` or ``None``.

    Returns:
        ``p_continuous[t] * grad[t]`` as ``[T, H]``, ``<grad[t], y_continuous[t]>`` and
        ``scale * <grad[t], sum_c table[ids[t, c]]>`` as ``[T]``, each in the dtype of what it is
        the gradient of, ``None`` for what was left out.

    Raises:
        ValueError: when shapes or dtypes do not fit each other.
        RuntimeError: on the CPU, for a code outside the table; CUDA makes that token's
            ``p_discrete`` gradient NaN.

    No communication, no host synchronisation.
    """
    _check(table, ids, y_continuous, p_continuous, p_discrete)
    if grad.shape != (ids.shape[0], table.shape[1]):
        raise ValueError(
            f"grad is {list(grad.shape)}; the result was {[ids.shape[0], table.shape[1]]}"
        )
    with torch.no_grad():
        if use_kernel(grad, table, ids, y_continuous, p_continuous, p_discrete):
            from vqmoe_megatron.vq.combine_triton import gather_scale_add_backward_triton

            return gather_scale_add_backward_triton(
                grad, table, ids, scale, y_continuous, p_continuous, p_discrete
            )
        exact = _sum_dtype(grad, table, y_continuous, p_continuous, p_discrete)
        table = table.to(exact)
        grad_y = None if y_continuous is None else torch.empty_like(y_continuous)
        grad_p_continuous, grad_p_discrete = (
            None if p is None else p.new_empty(ids.shape[0]) for p in (p_continuous, p_discrete)
        )
        for rows in _blocks(*grad.shape):
            g = grad[rows].to(exact)
            if grad_p_continuous is not None:
                products = y_continuous[rows].to(exact).mul(g)
                grad_p_continuous[rows] = products.sum(dim=1)
            if grad_p_discrete is not None:
                products = embedding_bag(ids[rows], table, mode="sum").mul_(g)
                grad_p_discrete[rows] = products.sum(dim=1).mul_(scale)
            if grad_y is not None:
                grad_y[rows] = g if p_continuous is None else g * p_continuous[rows].unsqueeze(1)
        return grad_y, grad_p_continuous, grad_p_discrete


def _blocks(num_tokens: int, hidden_size: int) -> Iterator[slice]:
    """Slices of the tokens, each of about BLOCK_ELEMENTS elements."""
    size = max(1, BLOCK_ELEMENTS // max(1, hidden_size))
    return (slice(first, first + size) for first in range(0, num_tokens, size))


def _sum_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    is_double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if is_double else torch.float32


def _check(
    table: torch.Tensor,
    ids: torch.Tensor,
    y_continuous: torch.Tensor | None,
    p_continuous: torch.Tensor | None,
    p_discrete: torch.Tensor | None,
) -> None:
    if table.dim() != 2 or ids.dim() != 2 or ids.shape[1] == 0 or ids.dtype != torch.int64:
        raise ValueError(
            f"need table [R, H] and int64 ids [T, C] with C >= 1, got table {list(table.shape)} "
            f"and {ids.dtype} ids {list(ids.shape)}"
        )
    num_tokens, hidden_size = ids.shape[0], table.shape[1]
    for name, tensor, wanted in (
        ("y_continuous", y_continuous, (num_tokens, hidden_size)),
        ("p_continuous", p_continuous, (num_tokens,)),
        ("p_discrete", p_discrete, (num_tokens,)),
    ):
        if tensor is not None and tensor.shape != wanted:
            raise ValueError(
                f"{name} is {list(tensor.shape)}; ids {list(ids.shape)} and table "
                f"{list(table.shape)} need {list(wanted)}"
            )
    if y_continuous is None and p_continuous is not None:
        raise ValueError("p_continuous weighs y_continuous, which is None; leave both out")
