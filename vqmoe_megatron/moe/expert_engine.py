"""The one place where rows meet experts: every path's rows in one plan, one exchange, one GEMM.

T tokens, k rows per token, S resident rows, H hidden size, N experts, n local experts.

1. Travelling rows of all requests are sorted by (expert, path, order) and sent to their experts'
   ranks; residents (of code space: this rank's code rows) join them there without travelling.
2. One grouped GEMM evaluates them together.
3. Outputs return to the rows that asked. Where nothing travels, nothing is sent at all.

``send_gradients`` is the way that straight-through gradients take in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from vqmoe_megatron.moe.code_rows import CodeRows, place_code_rows
from vqmoe_megatron.moe.dispatch import DispatchReceipt, ResidentRows, combine, dispatch
from vqmoe_megatron.moe.expert_slopes import expert_input_gradient
from vqmoe_megatron.moe.grouped_experts import evaluate_experts
from vqmoe_megatron.vq.permutation import PermutationPlan, plan_permutation


@dataclass(frozen=True)
class TravellingRows:
    """Rows of every token, for the experts that serve it."""

    rows: torch.Tensor  # [T, k, H]
    experts: torch.Tensor  # int64 [T, k]
    order: torch.Tensor  # int64 [T, k] in [0, num_orders): within an expert, beside other paths
    num_orders: int


@dataclass(frozen=True)
class Work:
    """What one path wants evaluated: nothing, rows that travel, rows that stay, or both."""

    travelling: tuple[TravellingRows, ...] = ()  # at most one
    residents: tuple[ResidentRows, ...] = ()  # at most one


@dataclass(frozen=True)
class Result:
    """The experts' outputs for one :class:`Work`, in its order."""

    rows: list[torch.Tensor]  # [T, k, H] each
    residents: list[torch.Tensor]  # [S, H] each; under expert tensor parallelism a shard's part


class ExpertEngine:
    """One layer's experts and the groups that their rows travel over. Owns no parameters.

    Subclasses decide otherwise where rows go and what is read on the host (``simulate``).
    """

    def __init__(
        self, experts: torch.nn.Module, num_experts: int, pg_collection: ProcessGroupCollection
    ) -> None:
        self.experts = experts
        self.num_experts = num_experts
        self.groups = pg_collection.ep, pg_collection.expt_tp

    def run(self, works: Sequence[Work]) -> list[Result]:
        """Evaluate what every path asks for.

        Communicates over the expert-parallel and expert-tensor groups as :func:`dispatch` and
        :func:`combine`; not at all where no path has travelling rows.
        """
        travelling = [rows for work in works for rows in work.travelling]
        residents = [rows for work in works for rows in work.residents]
        if travelling:
            of_rows, of_residents = self._exchange(travelling, residents)
        else:
            of_rows = []
            of_residents = [
                self.evaluate(r.rows, r.rows_per_local_expert, r.rows_per_expert) for r in residents
            ]
        rows, stayed = iter(of_rows), iter(of_residents)
        return [
            Result([next(rows) for _ in work.travelling], [next(stayed) for _ in work.residents])
            for work in works
        ]

    def _exchange(
        self, travelling: list[TravellingRows], residents: list[ResidentRows]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        sizes = [part.rows.shape[:2] for part in travelling]
        parts = [part.rows.reshape(-1, part.rows.shape[-1]) for part in travelling]
        flat = torch.cat(parts) if len(parts) > 1 else parts[0]  # [R, H]
        experts = torch.cat([part.experts.reshape(-1) for part in travelling])
        plan = self.plan(experts, self.num_experts, _order_within_expert(travelling))
        arrived, receipt = self.dispatch(flat, plan, residents)
        evaluated = self.evaluate(arrived, receipt.tokens_per_local_expert)
        returned, of_residents = combine(evaluated, receipt, *self.groups)
        parts = returned.split([t * k for t, k in sizes]) if len(sizes) > 1 else [returned]
        width = returned.shape[-1]  # said, since there may be no row
        outputs = [part.view(*size, width) for part, size in zip(parts, sizes, strict=True)]
        return outputs, of_residents

    def send_gradients(
        self,
        rows: torch.Tensor,
        plan: PermutationPlan,
        at_owner: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Bring gradients to the owners of their slots, and what those make of them back.

        Args:
            rows: ``[R, H]``.
            plan: of the R rows over all ranks' slots.
            at_owner: from arrived gradients ``[R', H]``, sorted by slot, and the number of them
                per own slot, to ``[R', D]``.

        Returns:
            ``[R, D]`` in the order of ``rows``. Communicates as :meth:`run`.
        """
        arrived, receipt = self.dispatch(rows, plan, [])
        answered = at_owner(arrived, receipt.tokens_per_local_expert)
        return combine(answered, receipt, *self.groups)[0]

    def plan(
        self, ids: torch.Tensor, num_ids: int, order: torch.Tensor | None = None
    ) -> PermutationPlan:
        """Where rows go: to id ``ids[r]`` of N experts or of all slots. No communication."""
        return plan_permutation(ids, num_ids, order)

    def dispatch(
        self, rows: torch.Tensor, plan: PermutationPlan, residents: list[ResidentRows]
    ) -> tuple[torch.Tensor, DispatchReceipt]:
        """:func:`dispatch` over this layer's groups."""
        return dispatch(rows, plan, *self.groups, residents)

    def evaluate(
        self,
        rows: torch.Tensor,
        tokens_per_expert: torch.Tensor,
        equal_count: int | None = None,
    ) -> torch.Tensor:
        """Outputs ``[R, H]`` of rows sorted by local expert. No communication."""
        return evaluate_experts(self.experts, rows, tokens_per_expert, equal_count)

    def input_gradient(
        self, inputs: torch.Tensor, code_rows: CodeRows, slots: torch.Tensor, grads: torch.Tensor
    ) -> torch.Tensor:
        """:func:`expert_input_gradient` of this rank's experts."""
        return expert_input_gradient(self.experts, inputs, code_rows, slots, grads)

    def read_num_rows(self, num_rows: torch.Tensor, balanced: int) -> int:
        """Bring a number of rows that follows the data to the host; ``balanced`` is what engines
        without data take it for. Host synchronisation. No communication."""
        return int(num_rows)

    def place(self, expert_of_row: torch.Tensor) -> CodeRows:
        """Where the rows of a code map are evaluated; reads it on the host. No communication."""
        group = self.groups[0]
        return place_code_rows(expert_of_row, self.num_experts, group.size(), group.rank())


EngineType = Callable[[torch.nn.Module, int, ProcessGroupCollection], ExpertEngine]


def _order_within_expert(travelling: list[TravellingRows]) -> torch.Tensor | None:
    """int64 ``[R]``: one path's rows behind the other's; alone they need no order."""
    if len(travelling) == 1:
        return None
    first, orders = 0, []
    for part in travelling:
        orders.append((part.order + first).reshape(-1))
        first += part.num_orders
    return torch.cat(orders)
