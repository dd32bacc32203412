"""One code table per microbatch, built on a second stream while attention runs.

A table is made of codes and experts and of nothing of the microbatch. So its experts and its
all-gather may run as soon as the transformer layer is entered; what the layer waits for is the
read. Backwards autograd runs them on the same stream again.
"""

from __future__ import annotations

import torch

from vqmoe_megatron.moe.code_assigner import Assignment
from vqmoe_megatron.moe.executions.code_space import CodeSpace, CodeTable
from vqmoe_megatron.moe.executions.execution import Answer, Execution
from vqmoe_megatron.moe.expert_engine import Work
from vqmoe_megatron.runtime.side_stream import SideStream


class TableAhead(Execution):
    """Builds one layer's table of code space before it is asked for."""

    def __init__(self, space: CodeSpace, stream: SideStream) -> None:
        self.space = space
        self.stream = stream
        self._table: CodeTable | None = None

    def start(self, dtype: torch.dtype) -> None:
        """Build the table now, for the next :meth:`ask` of a pass that differentiates.

        Communicates as :meth:`CodeSpace.evaluate`, on the side stream. Does nothing where no
        gradient is kept, and before data came to the codebook.
        """
        self.clear()
        if torch.is_grad_enabled() and not self.space.parts.assigner.codebook.needs_data_init:
            with self.stream.fork():
                self._table = self.space.evaluate(dtype)

    def ask(self, x: torch.Tensor, assignment: Assignment) -> tuple[Work, Answer]:
        """Read the table that was started, or else build one along with the other rows."""
        table = self._table if torch.is_grad_enabled() else None
        self.clear()
        if table is None:
            return self.space.ask(x, assignment)
        self.stream.join(table.values, table.before_norm, table.inputs.raw, table.inputs.normed)
        return Work(), lambda _: self.space.read(table, assignment, x.dtype)

    def clear(self) -> None:
        """Forget a table that nobody read."""
        self._table = None
