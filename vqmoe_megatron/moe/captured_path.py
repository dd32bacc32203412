"""The discrete path in code space, captured whole: codes, table and read, forwards and backwards.

In code space no shape follows the data and the host waits for nothing, so the path can be a CUDA
graph without capacity factors. What stays outside: the combine with another path's output, and the
VQ losses and statistics, whose Python runs in each backward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vqmoe_megatron.moe.code_assigner import Assignment, CodeAssigner
from vqmoe_megatron.moe.code_inputs import ExpertCodeInputs
from vqmoe_megatron.moe.code_rows import CodeRows
from vqmoe_megatron.moe.executions.code_space import CodeSpace
from vqmoe_megatron.moe.expert_engine import Work
from vqmoe_megatron.moe.part import DensePart
from vqmoe_megatron.moe.paths import DiscretePath, Request
from vqmoe_megatron.runtime.graphs import Graph
from vqmoe_megatron.runtime.static_graph import Captured


class BufferedPart(DensePart):
    """An output in a buffer that the next microbatch overwrites."""

    def value(self) -> torch.Tensor:
        """Return a copy, which a caller may keep."""
        return self.y.clone()


class CapturedPath(DiscretePath):
    """A :class:`DiscretePath` whose training passes are replayed from graphs.

    The first microbatch runs as it is: it may bring data to the codebook, and kernels choose their
    configurations. ``space.rows`` read the code map on the host; another map is captured anew.

    Args:
        new_graph: builds a graph; tests record instead.
    """

    def __init__(
        self,
        assigner: CodeAssigner,
        code_inputs: ExpertCodeInputs,
        space: CodeSpace,
        new_graph: Callable[[], Graph],
    ) -> None:
        super().__init__(assigner, code_inputs, space)
        self.space = space
        self.new_graph = new_graph
        self._has_run = False
        self._captured: Captured | None = None
        self._captured_rows: CodeRows | None = None

    @property
    def is_captured(self) -> bool:
        """Whether a microbatch was replayed."""
        return self._captured is not None

    def ask(self, hidden_states: torch.Tensor, x: torch.Tensor) -> Request:
        """As without graphs; the output is stored before it is combined, and copied where it is
        the layer's.

        Communicates the table, as :meth:`CodeSpace.evaluate`.
        """
        trains = self.assigner.training and torch.is_grad_enabled()
        if not trains or not self._has_run or self.assigner.codebook.needs_data_init:
            self._has_run |= trains
            return super().ask(hidden_states, x)
        y, *found = self._graph()(x)
        assignment = Assignment(*found)
        return Request(
            Work(),
            lambda _: BufferedPart(y),
            assignment.experts,
            lambda output: self.assigner.attach(output, assignment),
        )

    def _graph(self) -> Captured:
        rows = self.space.rows
        if self._captured is None or rows is not self._captured_rows:
            modules = [self.assigner, *self.space.modules]
            weights = self.space.weights()
            self._captured = Captured(self._whole, weights, modules, self.new_graph)
            self._captured_rows = rows
        return self._captured

    def _whole(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = self.assigner(x)
        table = self.space.evaluate(x.dtype)
        y = self.space.read(table, found, x.dtype).value()
        return y, found.prepared, found.codes, found.rows, found.experts
