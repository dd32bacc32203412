"""The read of fill: every token's weighted sum of the rows that experts have for its code.

T tokens, N experts, K codes, H hidden size, B tokens of a block.

    y[t] = sum over j of weights[t, j] * table[j, codes[t]]

Tokens are sorted by code and dealt to blocks of B, each of one code, padded with zeros; a block is
one matrix product [B, N] @ [N, H]. The number of blocks, T // B + K, does not follow the data, so
nothing is read on the host; with B >= N the tables of all blocks are at most T + N (K + 1) rows of
H, where [T, N, H] would be T N of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vqmoe_megatron.vq.segment_sum import count_ids, segment_sum

SMALLEST_BLOCK = 32  # tokens; fewer would leave a matrix unit idle


@dataclass(frozen=True)
class _Blocks:
    """Where tokens stand, sorted by code and padded."""

    place: torch.Tensor  # int64 [T], the row of each token among num_blocks * size
    code: torch.Tensor  # int64 [num_blocks]; of blocks without tokens it says nothing
    size: int  # B

    @classmethod
    def of(cls, codes: torch.Tensor, num_codes: int, num_experts: int) -> _Blocks:
        """Deal tokens with int64 codes ``[T]`` to blocks. No host synchronisation."""
        size = max(SMALLEST_BLOCK, num_experts)
        num_blocks = codes.numel() // size + num_codes
        counts = count_ids(codes, num_codes)
        ends = ((counts + size - 1) // size).cumsum(0)  # [K], blocks up to each code's last
        first_block = ends - (counts + size - 1) // size
        order = torch.argsort(codes, stable=True)
        sorted_codes = codes[order]
        behind = torch.arange(codes.numel(), device=codes.device)
        behind = behind - (counts.cumsum(0) - counts)[sorted_codes]  # in its code
        place = torch.empty_like(order)
        place[order] = first_block[sorted_codes] * size + behind
        blocks = torch.arange(num_blocks, device=codes.device)
        code = torch.searchsorted(ends, blocks, right=True).clamp(max=num_codes - 1)
        return cls(place, code, size)

    def spread(self, rows: torch.Tensor) -> torch.Tensor:
        """``[T, W]`` -> ``[num_blocks, B, W]``, zeros where no token stands."""
        spread = rows.new_zeros(self.code.numel() * self.size, rows.shape[1])
        return spread.index_copy_(0, self.place, rows).view(-1, self.size, rows.shape[1])

    def gather(self, blocks: torch.Tensor) -> torch.Tensor:
        """``[num_blocks, B, W]`` -> ``[T, W]``."""
        return blocks.reshape(-1, blocks.shape[2]).index_select(0, self.place)


class _FillFromTable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table: torch.Tensor, weights: torch.Tensor, codes: torch.Tensor):  # noqa: ANN001, ANN205
        ctx.save_for_backward(table, weights, codes)
        blocks = _Blocks.of(codes, table.shape[1], table.shape[0])
        rows = table.transpose(0, 1).index_select(0, blocks.code)  # [num_blocks, N, H]
        return blocks.gather(torch.bmm(blocks.spread(weights.to(table.dtype)), rows))

    @staticmethod
    def backward(ctx, grad: torch.Tensor):  # noqa: ANN001, ANN205
        table, weights, codes = ctx.saved_tensors
        num_experts, num_codes, width = table.shape
        blocks = _Blocks.of(codes, num_codes, num_experts)
        spread = blocks.spread(grad.to(table.dtype))  # [num_blocks, B, H]
        dtable = dweights = None
        if ctx.needs_input_grad[1]:
            rows = table.transpose(0, 1).index_select(0, blocks.code)
            dweights = blocks.gather(torch.bmm(spread, rows.transpose(1, 2))).to(weights.dtype)
        if ctx.needs_input_grad[0]:
            of_blocks = torch.bmm(blocks.spread(weights.to(table.dtype)).transpose(1, 2), spread)
            dtable = segment_sum(of_blocks.flatten(1), blocks.code, num_codes)
            dtable = dtable.view(num_codes, num_experts, width).transpose(0, 1)
        return dtable, dweights, None


def fill_from_table(
    table: torch.Tensor, weights: torch.Tensor, codes: torch.Tensor
) -> torch.Tensor:
    """Return each token's weighted sum of the rows of its code.

    Args:
        table: fp32 or fp64 ``[N, K, H]``, every expert's row of every code.
        weights: ``[T, N]``, zero where an expert does not answer.
        codes: int64 ``[T]`` in ``[0, K)``.

    Returns:
        ``[T, H]`` in the dtype of ``table``, in which all products and gradients are taken. Sums
        have a fixed order. No communication, no host synchronisation.
    """
    return _FillFromTable.apply(table, weights, codes)
