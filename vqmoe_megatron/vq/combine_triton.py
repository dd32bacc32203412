"""Kernels of the combine: gather the table's rows, scale, add, and the gradients of that.

T tokens, H hidden size, C codes per token, R rows of the table.

Both are bound by memory: a program takes BLOCK_T tokens, reads each of their elements once and
accumulates in fp32. The backward kernel walks over H with the same tokens, so that the two dot
products of a token are finished where they began, and gathers the rows again instead of saving
their sum. A code outside the table reads nothing and makes what depends on its row NaN.

Called by combine.py, which checks the arguments and chooses between this and plain torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MAX_BLOCK_H = 1024  # elements of one row that a program holds at once
BLOCK_ELEMENTS = 2048  # of one tile: 16 per thread of four warps, two 16-byte bf16 loads


def gather_scale_add_triton(
    table: torch.Tensor,
    ids: torch.Tensor,
    scale: float,
    y_continuous: torch.Tensor | None,
    p_continuous: torch.Tensor | None,
    p_discrete: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return ``[T, H]`` of ``dtype``; arguments as in ``combine.gather_scale_add``.

    No communication, no gradient, no host synchronisation, no other array of [T, H].
    """
    (num_tokens, num_codes), hidden_size = ids.shape, table.shape[1]
    out = torch.empty(num_tokens, hidden_size, dtype=dtype, device=table.device)
    if out.numel() == 0:
        return out
    block_t, block_h = _blocks(hidden_size)
    y_continuous = _with_dense_rows(y_continuous)
    table = _with_dense_rows(table)
    grid = triton.cdiv(num_tokens, block_t), triton.cdiv(hidden_size, block_h)
    with torch.cuda.device_of(table):
        _forward_kernel[grid](
            out,
            table,
            table.stride(0),
            ids.contiguous(),
            y_continuous,
            0 if y_continuous is None else y_continuous.stride(0),
            p_continuous,
            0 if p_continuous is None else p_continuous.stride(0),
            p_discrete,
            0 if p_discrete is None else p_discrete.stride(0),
            float(scale),
            num_tokens,
            hidden_size,
            table.shape[0],
            num_codes,
            BLOCK_T=block_t,
            BLOCK_H=block_h,
            enable_fp_fusion=True,
        )
    return out


def gather_scale_add_backward_triton(
    grad: torch.Tensor,
    table: torch.Tensor,
    ids: torch.Tensor,
    scale: float,
    y_continuous: torch.Tensor | None,
    p_continuous: torch.Tensor | None,
    p_discrete: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of ``combine.gather_scale_add_backward``, by one kernel.

    No communication, no host synchronisation, no other array of [T, H].
    """
    (num_tokens, num_codes), hidden_size = ids.shape, table.shape[1]
    grad_y = None if y_continuous is None else torch.empty_like(y_continuous)
    if grad_y is not None and grad_y.stride(1) != 1:
        grad_y = torch.empty(grad_y.shape, dtype=grad_y.dtype, device=grad_y.device)
    grad_p_continuous, grad_p_discrete = (
        None if p is None else p.new_zeros(num_tokens) for p in (p_continuous, p_discrete)
    )
    gradients = grad_y, grad_p_continuous, grad_p_discrete
    if grad.numel() == 0 or all(gradient is None for gradient in gradients):
        return gradients
    block_t, block_h = _blocks(hidden_size)
    grad = _with_dense_rows(grad)
    table = _with_dense_rows(table)
    y_continuous = _with_dense_rows(y_continuous)
    with torch.cuda.device_of(table):
        _backward_kernel[(triton.cdiv(num_tokens, block_t),)](
            grad_y,
            0 if grad_y is None else grad_y.stride(0),
            grad_p_continuous,
            grad_p_discrete,
            grad,
            grad.stride(0),
            table,
            table.stride(0),
            ids.contiguous(),
            y_continuous,
            0 if y_continuous is None else y_continuous.stride(0),
            p_continuous,
            0 if p_continuous is None else p_continuous.stride(0),
            float(scale),
            num_tokens,
            hidden_size,
            table.shape[0],
            num_codes,
            BLOCK_T=block_t,
            BLOCK_H=block_h,
            enable_fp_fusion=True,
        )
    return gradients


def _blocks(hidden_size: int) -> tuple[int, int]:
    block_h = min(MAX_BLOCK_H, triton.next_power_of_2(hidden_size))
    return BLOCK_ELEMENTS // block_h, block_h


def _with_dense_rows(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor itself when the elements of a row lie side by side, a copy otherwise."""
    return tensor if tensor is None or tensor.stride(1) == 1 else tensor.contiguous()


@triton.jit
def _sum_of_rows(
    table,
    table_stride,
    ids,
    tokens,
    columns,
    is_token,
    is_column,
    num_rows,
    num_codes,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """fp32 [BLOCK_T, BLOCK_H] sum of the rows of each token's codes, in the order of the codes."""
    total = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    for c in range(num_codes):
        row = tl.load(ids + tokens * num_codes + c, mask=is_token, other=0)
        exists = (row >= 0) & (row < num_rows)
        values = tl.load(
            table + row[:, None] * table_stride + columns[None, :],
            mask=(exists & is_token)[:, None] & is_column[None, :],
            other=0.0,
        ).to(tl.float32)
        total += tl.where(exists[:, None], values, float("nan"))
    return total


@triton.jit(do_not_specialize=["num_tokens"])
def _forward_kernel(
    out,  # [T, H]
    table,  # [R, H]
    table_stride,
    ids,  # int64 [T, C]
    y,  # [T, H] or None
    y_stride,
    p_continuous,  # [T] or None, as p_discrete
    p_continuous_stride,
    p_discrete,
    p_discrete_stride,
    scale,
    num_tokens,
    hidden_size,
    num_rows,
    num_codes,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    is_token = tokens < num_tokens
    is_column = columns < hidden_size
    mask = is_token[:, None] & is_column[None, :]
    total = _sum_of_rows(
        table,
        table_stride,
        ids,
        tokens,
        columns,
        is_token,
        is_column,
        num_rows,
        num_codes,
        BLOCK_T,
        BLOCK_H,
    )
    total = total * scale
    if p_discrete is not None:
        p = tl.load(p_discrete + tokens * p_discrete_stride, mask=is_token, other=0.0)
        total = total * p.to(tl.float32)[:, None]
    if y is not None:
        rows = tl.load(y + tokens[:, None] * y_stride + columns[None, :], mask=mask, other=0.0)
        rows = rows.to(tl.float32)
        if p_continuous is not None:
            p = tl.load(p_continuous + tokens * p_continuous_stride, mask=is_token, other=0.0)
            rows = rows * p.to(tl.float32)[:, None]
        total += rows
    tl.store(out + tokens[:, None] * hidden_size + columns[None, :], total, mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _backward_kernel(
    grad_y,  # out, [T, H] or None
    grad_y_stride,
    grad_p_continuous,  # out, [T] or None, as grad_p_discrete
    grad_p_discrete,
    grad,  # [T, H]
    grad_stride,
    table,  # [R, H]
    table_stride,
    ids,  # int64 [T, C]
    y,  # [T, H] or None
    y_stride,
    p_continuous,  # [T] or None
    p_continuous_stride,
    scale,
    num_tokens,
    hidden_size,
    num_rows,
    num_codes,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token = tokens < num_tokens
    with_y = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)  # sums to <g_t, y_t>
    with_rows = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)  # sums to <g_t, sum of the rows of t>
    p = tl.full([BLOCK_T], 1.0, tl.float32)
    if p_continuous is not None:
        p = tl.load(p_continuous + tokens * p_continuous_stride, mask=is_token, other=0.0)
        p = p.to(tl.float32)
    for first in range(0, hidden_size, BLOCK_H):
        columns = first + tl.arange(0, BLOCK_H)
        is_column = columns < hidden_size
        mask = is_token[:, None] & is_column[None, :]
        g = tl.load(grad + tokens[:, None] * grad_stride + columns[None, :], mask=mask, other=0.0)
        g = g.to(tl.float32)
        if grad_y is not None:
            tl.store(
                grad_y + tokens[:, None] * grad_y_stride + columns[None, :],
                g * p[:, None],
                mask=mask,
            )
        if grad_p_continuous is not None:
            rows = tl.load(y + tokens[:, None] * y_stride + columns[None, :], mask=mask, other=0.0)
            with_y += g * rows.to(tl.float32)
        if grad_p_discrete is not None:
            total = _sum_of_rows(
                table,
                table_stride,
                ids,
                tokens,
                columns,
                is_token,
                is_column,
                num_rows,
                num_codes,
                BLOCK_T,
                BLOCK_H,
            )
            with_rows += g * total
    if grad_p_continuous is not None:
        tl.store(grad_p_continuous + tokens, tl.sum(with_y, axis=1), mask=is_token)
    if grad_p_discrete is not None:
        tl.store(grad_p_discrete + tokens, tl.sum(with_rows, axis=1) * scale, mask=is_token)
