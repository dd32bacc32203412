"""One matrix product per expert over rows that are sorted by expert.

R rows, n local experts, I input width, O output width.
"""

from __future__ import annotations

import torch

GROUPED_MM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grouped_linear(
    rows: torch.Tensor,
    weight: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    equal_count: int | None = None,
) -> torch.Tensor:
    """Multiply each expert's rows by its weight: ``out[r] = weight[expert of r] @ rows[r]``.

    One expert takes one plain product, equal counts one batched product, which reads each weight
    once however few the rows. Else one ``torch.nn.functional.grouped_mm`` for fp32, bf16 and fp16.
    fp64 has no grouped kernel and takes one product per expert, with the counts read on the host;
    it serves exactness tests.

    Args:
        rows: ``[R, I]``, sorted by expert.
        weight: ``[n, O, I]``, Megatron's orientation of a linear weight.
        tokens_per_expert: integer ``[n]``, rows of each expert, zeros allowed, summing to R.
        equal_count: R / n where the host knows that all experts have so many rows.

    Returns:
        ``[R, O]`` in the dtype of ``rows``. No communication.
    """
    if weight.shape[0] == 1:
        return torch.nn.functional.linear(rows, weight.squeeze(0))
    if equal_count is not None:
        by_expert = rows.view(-1, equal_count, rows.shape[1]).transpose(1, 2)  # [n, I, R / n]
        # In this order the gradient of the weight comes out contiguous.
        return torch.bmm(weight, by_expert).transpose(1, 2).reshape(rows.shape[0], -1)
    if rows.dtype in GROUPED_MM_DTYPES and rows.shape[0] > 0:
        offsets = tokens_per_expert.to(rows.device).cumsum(0).to(torch.int32)
        return torch.nn.functional.grouped_mm(rows, weight.transpose(1, 2), offs=offsets)
    # unbind, not indexing: the backward of weight[e] would allocate all experts once per expert
    parts = rows.split(tokens_per_expert.tolist())
    return torch.cat([part @ w.t() for part, w in zip(parts, weight.unbind(0), strict=True)])
