"""Sums of rows that share an id: the gradient of a table lookup, the sum of a code's tokens.

T rows, H width, R ids.
"""

from __future__ import annotations

import torch


def segment_sum(rows: torch.Tensor, ids: torch.Tensor, num_ids: int) -> torch.Tensor:
    """Return ``out[i] = sum of rows[t] with ids[t] == i``, always in the same order.

    ``index_add_`` adds in no fixed order on CUDA. The gradient of an embedding sorts there and adds
    in fixed order on both devices.

    Args:
        rows: ``[T, H]``, floating.
        ids: int64 ``[T]``, values in ``[0, num_ids)``.
        num_ids: R.

    Returns:
        ``[R, H]`` in fp32 (fp64 for fp64 rows). No communication, no host synchronisation.
    """
    rows = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
    return torch.ops.aten.embedding_dense_backward(rows, ids, num_ids, -1, False)


def count_ids(ids: torch.Tensor, num_ids: int) -> torch.Tensor:
    """How often each of ``num_ids`` ids occurs: int64 ``[num_ids]``.

    ``bincount`` reads the largest id on the host first. No communication, no host synchronisation.
    """
    return torch.zeros(num_ids, dtype=torch.int64, device=ids.device).index_add_(
        0, ids, torch.ones_like(ids)
    )


class _SumLookedUpRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table: torch.Tensor, ids: torch.Tensor, scale: float, dtype):  # noqa: ANN001, ANN205
        ctx.save_for_backward(ids)
        ctx.num_rows, ctx.scale = table.shape[0], scale
        if ids.shape[1] == 1:
            rows = table if scale == 1.0 else table * scale
            return (rows if rows.dtype == dtype else rows.to(dtype)).index_select(0, ids[:, 0])
        table = table if scale == 1.0 else table * scale
        return torch.nn.functional.embedding_bag(ids, table, mode="sum").to(dtype)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):  # noqa: ANN001, ANN205
        (ids,) = ctx.saved_tensors
        rows = grad if ids.shape[1] == 1 else grad.repeat_interleave(ids.shape[1], dim=0)
        total = segment_sum(rows, ids.reshape(-1), ctx.num_rows)
        return total if ctx.scale == 1.0 else total.mul_(ctx.scale), None, None, None


def sum_looked_up_rows(
    table: torch.Tensor, ids: torch.Tensor, scale: float, dtype: torch.dtype
) -> torch.Tensor:
    """Return ``scale * sum over c of table[ids[:, c]]``.

    Args:
        table: ``[R, H]``; its gradient is summed in fp32 (fp64) by :func:`segment_sum`.
        ids: int64 ``[T, C]``.
        scale: one number.
        dtype: of the result.

    Returns:
        ``[T, H]``. Only the ids are kept for the backward pass. No communication.
    """
    return _SumLookedUpRows.apply(table, ids, scale, dtype)


def lookup_rows(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return ``table[ids]`` of int64 ids ``[T]``: ``[T, H]``, with that gradient."""
    return sum_looked_up_rows(table, ids.unsqueeze(1), 1.0, table.dtype)


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: torch.Tensor, ids: torch.Tensor, num_ids: int):  # noqa: ANN001, ANN205
        ctx.save_for_backward(ids)
        ctx.dtype = rows.dtype
        return segment_sum(rows, ids, num_ids)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):  # noqa: ANN001, ANN205
        (ids,) = ctx.saved_tensors
        return grad.index_select(0, ids).to(ctx.dtype), None, None


def sum_rows(rows: torch.Tensor, ids: torch.Tensor, num_ids: int) -> torch.Tensor:
    """:func:`segment_sum` of rows ``[T, H]``, with the gradient of a row being that of its sum."""
    return _SumRows.apply(rows, ids, num_ids)
