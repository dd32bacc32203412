"""Token dispatch: every token sends its C rows to the experts of its codes.

T tokens, C codes per token, H hidden size.
"""

from __future__ import annotations

import torch

from vqmoe_megatron.moe.code_assigner import Assignment
from vqmoe_megatron.moe.discrete_input import discrete_rows
from vqmoe_megatron.moe.discrete_parts import DiscreteParts
from vqmoe_megatron.moe.executions.execution import Answer, Execution
from vqmoe_megatron.moe.expert_engine import Result, TravellingRows, Work
from vqmoe_megatron.moe.part import DensePart, sum_slots


class Tokens(Execution):
    """The execution that is exact for every expert input."""

    def __init__(self, parts: DiscreteParts) -> None:
        self.parts = parts

    def ask(self, x: torch.Tensor, assignment: Assignment) -> tuple[Work, Answer]:
        """C travelling rows per token; no communication but that of :func:`discrete_rows`."""
        parts = self.parts
        rows = parts.input_norm(discrete_rows(x, assignment, parts))
        num_orders = parts.vq.num_code_slices * parts.vq.num_codes
        travelling = TravellingRows(rows, assignment.experts, assignment.rows, num_orders)

        def answer(result: Result) -> DensePart:
            y = sum_slots(result.rows[0]) / parts.vq.num_code_slices**0.5
            return DensePart(parts.finish(y, assignment).to(x.dtype))

        return Work(travelling=(travelling,)), answer
