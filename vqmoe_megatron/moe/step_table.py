"""One code table per optimizer step: built once, read by every microbatch, differentiated once.

Neither weights nor codebook move within a step, and everything is linear in the gradients of the
table's rows. So the first microbatch builds the table, every microbatch adds its rows' gradients,
and one backward pass brings the sum to the weights before they are reduced.

1. ``get`` builds the table at its first call of a step (also inside a recomputed forward pass,
   whose own graph is thrown away) and hands out a leaf, in whose gradient the microbatches add up.
2. ``backward`` runs once, after the last microbatch and before gradients are reduced.
3. ``clear`` forgets the table: after the step, and whenever training turns to evaluation or back.
   In evaluation one table serves until then, or until a weight is seen to change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from vqmoe_megatron.moe.code_space import CodeTable


class StepTable:
    """Keeps one layer's table, built by ``evaluate`` of ``weights``, between microbatches."""

    def __init__(
        self,
        evaluate: Callable[[torch.dtype], CodeTable],
        weights: Callable[[], list[torch.Tensor]] = list,
    ) -> None:
        self.evaluate = evaluate
        self.weights = weights
        self._built: CodeTable | None = None  # with its graph
        self._leaf: CodeTable | None = None
        self._versions: list[tuple[int, int]] = []  # of the weights the table was built of

    def get(self, is_training: bool, dtype: torch.dtype) -> CodeTable:
        """Return the table; ``values`` collects the step's gradient. The experts run in ``dtype``.

        Communicates at the first call after :meth:`clear`, as :meth:`CodeSpace.evaluate`.

        Raises:
            ValueError: when an optimizer moved the weights and the table's gradient never reached
                them. Writes through ``.data``, as Megatron's optimizers do, are not seen.
        """
        versions = [(weight.data_ptr(), weight._version) for weight in self.weights()]
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
                self._built = self.evaluate(dtype)
            values = self._built.values.detach().requires_grad_(is_training)
            self._leaf = dataclasses.replace(self._built, values=values)
        return self._leaf

    def backward(self) -> None:
        """Bring the collected gradient to the weights, then forget the table.

        Communicates as the backward pass of :meth:`CodeSpace.evaluate`; all ranks of its groups
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

    def leave(self) -> None:
        """Forget the table because training turns to evaluation or back.

        Raises:
            ValueError: in the middle of a step, whose gradient would be lost.
        """
        if self._leaf is not None and self._leaf.values.grad is not None:
            raise ValueError(
                "training turned to evaluation between two microbatches of one step; with "
                "vq.table_per_step the step must be finished first (CodebookSync)"
            )
        self.clear()

    def clear(self) -> None:
        """Forget the table and what was collected. No communication."""
        self._built = self._leaf = None
