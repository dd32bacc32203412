"""One code table per optimizer step: built once, read by every microbatch, differentiated once.

Neither weights nor codebook move within a step, and everything is linear in the gradients of the
table's rows. So the first microbatch builds the table, every microbatch adds its rows' gradients,
and one backward pass brings the sum to the weights before they are reduced.

1. ``get`` builds the table at its first call of a step (also inside a recomputed forward pass,
   whose own graph is thrown away) and hands out a leaf, in whose gradient the microbatches add up.
2. ``finish_table`` runs once, after the last microbatch and before gradients are reduced.
3. ``clear`` forgets the table: after the step, and whenever training turns to evaluation or back.
   In evaluation one table serves until then, or until a weight is seen to change.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from vqmoe_megatron.moe.executions.execution import Answer, Execution
from vqmoe_megatron.moe.executions.table_space import Table, TableSpace
from vqmoe_megatron.moe.expert_engine import Work


class StepTable(Execution):
    """Keeps one layer's table, of code space or of fill, between microbatches."""

    keeps_table = True

    def __init__(self, space: TableSpace) -> None:
        self.space = space
        self._built: Table | None = None  # with its graph
        self._leaf: Table | None = None
        self._versions: list[tuple[int, int]] = []  # of the weights the table was built of

    def ask(self, x: torch.Tensor, request: Any) -> tuple[Work, Answer]:
        """Nothing, since the table is there; communicates as :meth:`get`.

        An evaluation that differentiates builds a table of its own.
        """
        is_training = self.space.is_training
        if not is_training and torch.is_grad_enabled():
            return self.space.ask(x, request)
        table = self.get(is_training, x.dtype)
        return Work(), lambda _: self.space.read(table, request, x.dtype)

    def get(self, is_training: bool, dtype: torch.dtype) -> Table:
        """Return the table; ``values`` collects the step's gradient. The experts run in ``dtype``.

        Communicates at the first call after :meth:`clear`, as :meth:`TableSpace.evaluate`.

        Raises:
            ValueError: when an optimizer moved the weights and the table's gradient never reached
                them. Writes through ``.data``, as Megatron's optimizers do, are not seen.
        """
        versions = [(weight.data_ptr(), weight._version) for weight in self.space.weights()]
        if self._leaf is not None and versions != self._versions:
            if is_training:
                raise ValueError(
                    "weights changed between two microbatches of one table: vq.table_per_step "
                    "needs CodebookSync as config.finalize_model_grads_func, which ends the table "
                    "of each step"
                )
            self.clear()
        if self._leaf is None:
            self._versions = versions
            with torch.set_grad_enabled(is_training):
                self._built = self.space.evaluate(dtype)
            collects = is_training and self._built.values.requires_grad
            values = self._built.values.detach().requires_grad_(collects)
            self._leaf = dataclasses.replace(self._built, values=values)
        return self._leaf

    def finish_table(self) -> None:
        """Bring the collected gradient to the weights, then forget the table.

        Communicates as the backward pass of :meth:`TableSpace.evaluate`; all ranks of its groups
        must call it together.
        """
        built, leaf = self._built, self._leaf
        self.clear()
        if built is not None and leaf is not None and built.values.requires_grad:
            grad = leaf.values.grad
            built.values.backward(torch.zeros_like(built.values) if grad is None else grad)

    def refuse_unfinished(self) -> None:
        """Raise ``ValueError`` where collected gradients have not been brought to the weights."""
        if self._leaf is not None and self._leaf.values.grad is not None:
            raise ValueError(
                "the optimizer steps before the gradient of the step's table reached the weights; "
                "vq.table_per_step needs a training schedule of Megatron, or CodebookSync()(model) "
                "in the place of finalize_model_grads(model)"
            )

    def enter(self, is_training: bool, was_training: bool) -> None:
        """Forget the table: training turns to evaluation or back, or the weights may be others.

        Raises:
            ValueError: in the middle of a step, whose gradient would be lost.
        """
        if is_training and was_training:
            return  # the same step goes on
        is_unfinished = self._leaf is not None and self._leaf.values.grad is not None
        if is_unfinished and is_training != was_training:
            raise ValueError(
                "training turned to evaluation between two microbatches of one step; with "
                "vq.table_per_step the step must be finished first (CodebookSync)"
            )
        self.clear()

    def clear(self) -> None:
        """Forget the table and what was collected. No communication."""
        self._built = self._leaf = None
