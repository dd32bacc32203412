"""How often each row of a code memory is read, counted in training.

A addresses per token, M rows per address, R = A M rows, T local tokens of a microbatch, U distinct
rows among those that they read. Row r is row r // A of the address that reads it
(``vq/row_addresses``); reads are kept address by address.

Reads of a microbatch are added where its rows are planned, on the device; once per step they are
summed over the replicas with everything else that the step's end sums, frozen codes or not. That is
cheap enough for every step: for R = 100,000 on one core of a CPU 0.03 ms per microbatch of 12,288
reads, and 0.6 ms and 400 kB of an all-reduce per step, where a step of a model of that size takes
hundreds of milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vqmoe_megatron.moe.memory.row_plan import RowPlan
from vqmoe_megatron.moe.step_statistics import KeepsStatistics

NUM_SUMS_BESIDE_READS = 2  # distinct rows, and the plans they were counted in


class RowUsage(KeepsStatistics):
    """Reads by row of this step, and of all steps since the process began; never in checkpoints.

    Counts are fp32: exact up to 16.8 million reads of one row on one rank in one step.
    """

    step_reads: torch.Tensor  # fp32 [R], of this rank's tokens; after the reduction of all
    step_distinct: torch.Tensor  # fp32 [2]: U summed over plans in the form of rows, and such plans
    reads_so_far: torch.Tensor  # fp32 [R], of all replicas, without the step

    def __init__(self, num_addresses: int, num_rows: int, device: torch.device | None) -> None:
        super().__init__()
        self.num_addresses, self.num_rows = num_addresses, num_rows
        total = num_addresses * num_rows
        for name, size in (
            ("step_reads", total),
            ("step_distinct", NUM_SUMS_BESIDE_READS),
            ("reads_so_far", total),
        ):
            self.register_buffer(name, torch.zeros(size, device=device), persistent=False)
        self.knows_distinct = False  # whether a plan of this rank told U

    @torch.no_grad()
    def record(self, rows: torch.Tensor, plan: RowPlan) -> None:
        """Count the row ids int64 ``[T, A]`` that a trained microbatch reads by ``plan``.

        U is counted where the plan knows it on the host, in the form of rows. No communication, no
        host synchronisation.
        """
        address = torch.arange(self.num_addresses, device=rows.device)
        ids = (rows // self.num_addresses + address * self.num_rows).flatten()
        self.step_reads.index_add_(0, ids, self.step_reads.new_ones(()).expand_as(ids))
        if plan.asked is not None:
            self.step_distinct[0] += float(plan.num_wanted)
            self.step_distinct[1] += 1.0
            self.knows_distinct = True

    def local_parts(self) -> list[torch.Tensor]:
        """``step_reads`` and ``step_distinct``."""
        return [self.step_reads, self.step_distinct]

    def scalars_of(self, parts: Iterator[torch.Tensor]) -> dict[str, torch.Tensor]:
        """What reduced parts say, with the steps before: fp32 scalars by metric name."""
        reads, (distinct, num_plans) = next(parts), next(parts)
        so_far = self.reads_so_far + reads
        most_read = so_far.topk(-(-so_far.numel() // 100)).values
        scalars = {
            "rows_in_use": (so_far > 0).float().mean(),
            "top_percent_reads": most_read.sum() / so_far.sum().clamp(min=1.0),
        }
        if self.knows_distinct:
            scalars["distinct_rows"] = distinct / num_plans.clamp(min=1.0)
        return scalars

    def apply_parts(self, reduced: Iterator[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Add the reduced step to what was read so far; return its scalars. No communication."""
        reads, distinct = next(reduced), next(reduced)
        scalars = self.scalars_of(iter([reads, distinct]))
        self.reads_so_far += reads
        return scalars

    def by_address(self) -> torch.Tensor:
        """The step's reads fp32 ``[A, M]``, a copy."""
        return self.step_reads.view(self.num_addresses, self.num_rows).clone()

    def clear_step(self) -> None:
        """Forget the step's reads."""
        self.step_reads.zero_()
        self.step_distinct.zero_()
