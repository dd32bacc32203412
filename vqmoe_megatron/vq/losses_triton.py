"""Kernels of the VQ losses: the squared distance of tokens from their codes, and its gradient.

T tokens, C code slices, K codes per slice, D slice width.

Both are bound by memory. In plain torch the difference is an fp32 array of [T, H] that is written
and read four times in a step and layer; here a token is read once in each pass, and nothing of that
size is written but the gradient, in the token's own dtype. A program takes BLOCK_T tokens of one
slice; the sum of each program is added to the others by torch, always in the same order.

Called by losses.py, which chooses between this and plain torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MAX_BLOCK_D = 1024  # columns that a program holds at once
BLOCK_ELEMENTS = 2048  # of one tile


def squared_error_triton(x: torch.Tensor, vectors: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Sum of ``(x - v)^2`` over all elements, a fp32 scalar.

    Args:
        x: ``[T, C * D]`` fp32, bf16 or fp16.
        vectors: ``[C, K, D]``.
        ids: int64 ``[T, C]``.

    No communication, no gradient, no host synchronisation.
    """
    num_tokens, num_slices = ids.shape
    block_t, block_d = _blocks(vectors.shape[2])
    grid = triton.cdiv(num_tokens, block_t), num_slices
    sums = torch.zeros(max(grid[0], 1), num_slices, dtype=torch.float32, device=x.device)
    if num_tokens:
        with torch.cuda.device_of(x):
            _error_kernel[grid](
                sums, *_arguments(x, vectors, ids), BLOCK_T=block_t, BLOCK_D=block_d
            )
    return sums.sum()


def error_gradient_triton(
    x: torch.Tensor, vectors: torch.Tensor, ids: torch.Tensor, factor: float, at_loss: torch.Tensor
) -> torch.Tensor:
    """``factor * at_loss * (x - v)``, ``[T, C * D]`` in the dtype of ``x``.

    Arguments as :func:`squared_error_triton`; ``at_loss`` is a scalar tensor on the device. No
    communication, no host synchronisation.
    """
    num_tokens, num_slices = ids.shape
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if num_tokens:
        block_t, block_d = _blocks(vectors.shape[2])
        with torch.cuda.device_of(x):
            _gradient_kernel[(triton.cdiv(num_tokens, block_t), num_slices)](
                dx,
                at_loss,
                float(factor),
                *_arguments(x, vectors, ids),
                BLOCK_T=block_t,
                BLOCK_D=block_d,
            )
    return dx


def _arguments(x: torch.Tensor, vectors: torch.Tensor, ids: torch.Tensor) -> tuple:
    x, vectors = (
        tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (x, vectors)
    )
    vectors = vectors.contiguous()
    return x, x.stride(0), vectors, ids.contiguous(), ids.shape[0], *vectors.shape[1:]


def _blocks(width: int) -> tuple[int, int]:
    block_d = min(MAX_BLOCK_D, triton.next_power_of_2(width))
    return max(1, BLOCK_ELEMENTS // block_d), block_d


@triton.jit
def _difference(
    x,
    x_stride,
    vectors,
    ids,
    tokens,
    c,
    column,
    num_tokens,
    num_codes,
    width,
):
    """fp32 [BLOCK_T, BLOCK_D] of x - v, zero where there is no token or column; and that mask."""
    is_token = tokens < num_tokens
    mask = is_token[:, None] & (column < width)[None, :]
    rows = tl.load(
        x + tokens[:, None] * x_stride + c * width + column[None, :], mask=mask, other=0.0
    ).to(tl.float32)
    code = tl.load(ids + tokens * tl.num_programs(1) + c, mask=is_token, other=0)
    v = tl.load(
        vectors + (c * num_codes + code[:, None]) * width + column[None, :], mask=mask, other=0.0
    ).to(tl.float32)
    return rows - v, mask


@triton.jit(do_not_specialize=["num_tokens"])
def _error_kernel(
    sums,  # out, fp32 [programs, C]
    x,  # [T, C * D]
    x_stride,
    vectors,  # [C, K, D]
    ids,  # int64 [T, C]
    num_tokens,
    num_codes,
    width,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1).to(tl.int64)
    squares = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for d in range(0, width, BLOCK_D):
        column = d + tl.arange(0, BLOCK_D)
        error, _ = _difference(
            x, x_stride, vectors, ids, tokens, c, column, num_tokens, num_codes, width
        )
        squares += error * error
    tl.store(sums + tl.program_id(0) * tl.num_programs(1) + c, tl.sum(tl.sum(squares, axis=1)))


@triton.jit(do_not_specialize=["num_tokens"])
def _gradient_kernel(
    dx,  # out, [T, C * D]
    at_loss,  # a scalar
    factor,
    x,  # [T, C * D]
    x_stride,
    vectors,  # [C, K, D]
    ids,  # int64 [T, C]
    num_tokens,
    num_codes,
    width,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1).to(tl.int64)
    scale = tl.load(at_loss).to(tl.float32) * factor
    hidden = tl.num_programs(1) * width
    for d in range(0, width, BLOCK_D):
        column = d + tl.arange(0, BLOCK_D)
        error, mask = _difference(
            x, x_stride, vectors, ids, tokens, c, column, num_tokens, num_codes, width
        )
        places = tokens[:, None] * hidden + c * width + column[None, :]
        tl.store(dx + places, error * scale, mask=mask)
