"""Expert engines that send rows where a plan assumes them, count them, or need no tokens at all.

R rows, N destinations (experts, or slots of the code table), P expert-parallel ranks, E
expert-tensor ranks.

How many rows travel depends on the data, and a plan cannot know it; a plan assumes balance. With
balanced rows a run on real ranks has exactly the balance that the plan assumes, and a simulated
rank, which has no data, has the same. Row j goes to rank j mod P. What the model learns under it
means nothing; what it sends does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from vqmoe_megatron.moe.code_rows import CodeRows, place_code_rows
from vqmoe_megatron.moe.dispatch import DispatchReceipt, ResidentRows, dispatch
from vqmoe_megatron.moe.expert_engine import ExpertEngine, Result, Work
from vqmoe_megatron.vq.code_map import mod_map
from vqmoe_megatron.vq.permutation import PermutationPlan

Record = Callable[[str, DispatchReceipt, int], None]  # "forward" | "backward", receipt, R


class BalancedEngine(ExpertEngine):
    """Sends every layer's rows to all ranks of its expert-parallel group equally."""

    def plan(
        self, ids: torch.Tensor, num_ids: int, order: torch.Tensor | None = None
    ) -> PermutationPlan:
        """Plan ``[R]`` rows by their number alone.

        Raises:
            ValueError: when the rows do not divide by the ranks.
        """
        num_ranks, num_rows = self.groups[0].size(), ids.numel()
        if num_rows % num_ranks:
            raise ValueError(
                f"balanced routing: rows % EP != 0: {num_rows} % {num_ranks} = "
                f"{num_rows % num_ranks}; choose a micro batch and a sequence length that divide"
            )
        per_rank = num_ids // num_ranks
        row = torch.arange(num_rows, device=ids.device)
        balanced = row % num_ranks * per_rank + row // num_ranks % per_rank
        return super().plan(balanced, num_ids, order)

    def read_num_rows(self, num_rows: torch.Tensor, balanced: int) -> int:
        """What the plan assumes."""
        return balanced


class CountedEngine(ExpertEngine):
    """Tells ``record`` of the rows that travel forward, and of code space's gradient rows."""

    def __init__(self, record: Record, *of_layer: Any) -> None:
        super().__init__(*of_layer)
        self.record = record
        self.direction = "forward"

    def run(self, works: Sequence[Work]) -> list[Result]:
        """As it is, and recorded as forward."""
        self.direction = "forward"
        return super().run(works)

    def send_gradients(self, *args: Any) -> torch.Tensor:
        """As it is, and recorded as backward."""
        self.direction = "backward"
        return super().send_gradients(*args)

    def dispatch(
        self, rows: torch.Tensor, plan: PermutationPlan, residents: list[ResidentRows]
    ) -> tuple[torch.Tensor, DispatchReceipt]:
        """As it is, and recorded."""
        arrived, receipt = super().dispatch(rows, plan, residents)
        self.record(self.direction, receipt, rows.shape[0])
        return arrived, receipt


class BalancedCountedEngine(BalancedEngine, CountedEngine):
    """Both."""


class SimulatedEngine(BalancedEngine):
    """Works on fake tensors and in a fake process group: sizes are those of balanced rows."""

    def __init__(
        self, experts: torch.nn.Module, num_experts: int, pg_collection: ProcessGroupCollection
    ) -> None:
        super().__init__(experts, num_experts, pg_collection)
        # torch's rule for shapes of grouped_mm knows bf16 only.
        experts.matmul = same_shape_as_grouped_linear

    def dispatch(
        self, rows: torch.Tensor, plan: PermutationPlan, residents: list[ResidentRows]
    ) -> tuple[torch.Tensor, DispatchReceipt]:
        """The one host synchronisation answers: R / P rows to and from every rank."""
        num_ranks, num_shards = (group.size() for group in self.groups)
        share = rows.shape[0] // num_ranks
        sizes = [share] * (2 * num_ranks) + [rows.shape[0]] * num_shards
        return dispatch(rows, plan, *self.groups, residents, lambda _: sizes)

    def place(self, expert_of_row: FakeTensor) -> CodeRows:
        """With the map expert = row mod N, whose slots are as many as those of every other map."""
        with unset_fake_temporarily():
            group = self.groups[0]
            real = place_code_rows(
                mod_map(expert_of_row.numel(), self.num_experts),
                self.num_experts,
                group.size(),
                group.rank(),
            )
        fake = {
            name: expert_of_row.fake_mode.from_tensor(value)
            for name, value in vars(real).items()
            if isinstance(value, torch.Tensor)
        }
        return CodeRows(**{**vars(real), **fake})


def same_shape_as_grouped_linear(
    rows: torch.Tensor,
    weight: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    equal_count: int | None = None,
) -> torch.Tensor:
    """Rows ``[R, I]`` times the mean of weights ``[n, O, I]``: gradients reach both."""
    return rows @ weight.mean(dim=0).t()
