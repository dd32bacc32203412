"""Code space: the discrete path evaluated once per code row instead of once per token.

T tokens, H hidden size, C code slices, K codes, P expert-parallel and E expert-tensor ranks, S
slots per rank (``code_rows``).

An expert that sees codes only has at most C * K different outputs. So:

1. ``inputs``: this rank's S rows, of the experts it owns, through the input norm.
2. The caller evaluates its experts on them, alone or along with other rows.
3. ``table``: partial outputs are summed over the expert-tensor ranks, all ranks' rows gathered:
   [P * S, H]; with one code per token the output norm is taken here.
4. ``output``: each token reads its C rows. Backwards the rows' gradients are summed in fp32 and
   return by 3, 2, 1; ``straight_through`` decides what the token gets.

No token travels forward, no count is exchanged, no shape depends on the data.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vqmoe_megatron.moe.code_assigner import Assignment
from vqmoe_megatron.moe.code_rows import CodeRows
from vqmoe_megatron.moe.discrete_parts import DiscreteParts
from vqmoe_megatron.moe.dispatch import ResidentRows
from vqmoe_megatron.moe.executions.execution import Answer
from vqmoe_megatron.moe.executions.table_space import Table, TableSpace
from vqmoe_megatron.moe.expert_engine import ExpertEngine, Result, Work
from vqmoe_megatron.moe.grouped_experts import GroupedExperts
from vqmoe_megatron.moe.norms import NoNorm
from vqmoe_megatron.moe.part import DensePart, Part
from vqmoe_megatron.moe.straight_through import mean_over_tokens, with_gradient_to
from vqmoe_megatron.moe.table_combine import combine_with_table
from vqmoe_megatron.moe.table_exchange import gather_table, sum_over_shards
from vqmoe_megatron.vq.permutation import PermutationPlan
from vqmoe_megatron.vq.segment_sum import sum_looked_up_rows


@dataclass(frozen=True)
class ExpertInputs:
    """This rank's rows on their way to the experts."""

    raw: torch.Tensor  # [S, H], before the input norm
    normed: torch.Tensor  # [S, H], what the experts see


@dataclass(frozen=True)
class CodeTable(Table):
    """All rows' outputs ``[P * S, H]``, and what their gradients need."""

    before_norm: torch.Tensor  # [P * S, H] without gradient; values without output norm
    inputs: ExpertInputs  # without gradient


class CodeSpace(TableSpace):
    """One layer's table: how it is built, read and differentiated. Owns no parameters."""

    def __init__(self, parts: DiscreteParts, engine: ExpertEngine) -> None:
        self.parts = parts
        self.engine = engine
        mode, experts = parts.vq.straight_through, engine.experts
        if mode in ("token", "group") and not isinstance(experts, GroupedExperts):
            warnings.warn(
                f"vq.straight_through={mode}: {type(experts).__name__} does not show its "
                "activations, so its forward pass is repeated on the tokens' rows, twice the cost "
                "of GroupedExperts",
                stacklevel=2,
            )
        sums_slices = parts.vq.num_code_slices > 1
        # The output norm acts on rows of the table; a sum of slices is normed after it.
        self.table_norm = NoNorm() if sums_slices else parts.output_norm
        # Whether a token's output is its rows' scaled sum, with no norm behind it.
        self.reads_final_rows = not sums_slices or isinstance(parts.output_norm, NoNorm)
        self._rows: CodeRows | None = None
        self._rows_version: tuple[int, int] | None = None

    @property
    def rows(self) -> CodeRows:
        """Where every row is evaluated; found again when the code map was replaced."""
        code_map = self.parts.assigner.code_map
        version = (code_map.expert_of_row.data_ptr(), code_map.expert_of_row._version)
        if self._rows is None or version != self._rows_version:
            with torch.inference_mode(False):  # kept, and saved for backward passes later
                self._rows = self.engine.place(code_map.expert_of_row)
            self._rows_version = version
        return self._rows

    def ask(self, x: torch.Tensor, assignment: Assignment) -> tuple[Work, Answer]:
        """This rank's code rows stay where they are; the answer reads the table they make."""
        inputs = self.inputs(x.dtype)

        def answer(result: Result) -> Part:
            return self.read(self.table(inputs, result.residents[0]), assignment, x.dtype)

        return self._work(inputs), answer

    @property
    def is_training(self) -> bool:
        """As the codebook's owner."""
        return self.parts.assigner.training

    def weights(self) -> list[torch.Tensor]:
        """Everything that the table is made of."""
        weights = [weight for module in self.modules for weight in module.parameters()]
        return [*weights, self.parts.assigner.codebook.codes]

    @property
    def modules(self) -> list[torch.nn.Module]:
        """What holds them, but for the codes."""
        modules = (self.engine.experts, *self.parts.modules)
        return [module for module in modules if isinstance(module, torch.nn.Module)]

    # 1.
    def inputs(self, dtype: torch.dtype) -> ExpertInputs:
        """Build this rank's expert inputs. No communication."""
        raw = self.parts.code_inputs(self.rows.local_rows).to(dtype)
        return ExpertInputs(raw, self.parts.input_norm(raw))

    def _work(self, inputs: ExpertInputs) -> Work:
        rows = self.rows
        residents = ResidentRows(inputs.normed, rows.rows_per_local_expert, rows.rows_per_expert)
        return Work(residents=(residents,))

    # 2. and 3.
    def evaluate(self, dtype: torch.dtype) -> CodeTable:
        """Build the table with the experts on code rows alone.

        Communicates over the expert-tensor group (one all-reduce) and the expert-parallel group
        (one all-gather), in the backward pass one all-reduce and one reduce-scatter.
        """
        inputs = self.inputs(dtype)
        (result,) = self.engine.run([self._work(inputs)])
        return self.table(inputs, result.residents[0])

    def table(self, inputs: ExpertInputs, outputs: torch.Tensor) -> CodeTable:
        """Build the table from this rank's expert outputs ``[S, H]``; communicates as above."""
        ep_group, expt_tp_group = self.engine.groups
        values = gather_table(sum_over_shards(outputs, expt_tp_group), ep_group)
        before_norm = values.detach()
        values = self.table_norm(values)
        detached = ExpertInputs(inputs.raw.detach(), inputs.normed.detach())
        return CodeTable(values, before_norm, detached)

    # 4.
    def read(self, table: CodeTable, assignment: Assignment, dtype: torch.dtype) -> Part:
        """What tokens read, ``[T, H]`` in ``dtype``; where possible, while it is added."""
        if self.reads_final_rows:
            return TablePart(self, table, assignment, dtype)
        y = self.output(table, assignment, dtype)
        return DensePart(self.parts.finish(y, assignment).to(dtype))

    def output(self, table: CodeTable, assignment: Assignment, dtype: torch.dtype) -> torch.Tensor:
        """Read every token's rows: ``[T, H]`` in ``dtype``, scaled by 1 / sqrt(C).

        Communicates in the backward pass only, for straight_through token and group: over the
        expert-parallel and expert-tensor groups (dispatch), for group also over TP.
        """
        slots = self.rows.slot_of_row[assignment.rows]  # [T, C]
        y = sum_looked_up_rows(table.values, slots, self._scale, dtype)
        gradient = self._gradient_to_tokens(table, slots)
        return y if gradient is None else with_gradient_to(y, assignment.prepared, gradient)

    def combined_output(
        self,
        table: CodeTable,
        assignment: Assignment,
        first: torch.Tensor,
        weights: tuple[torch.Tensor | None, torch.Tensor],
    ) -> torch.Tensor:
        """The weighted sum with another path's output; this one's is never stored.

        Only where :attr:`reads_final_rows`. Communicates as :meth:`output`.
        """
        slots = self.rows.slot_of_row[assignment.rows]
        gradient = self._gradient_to_tokens(table, slots)
        return combine_with_table(
            first,
            weights,
            table.values,
            slots,
            self._scale,
            assignment.prepared,
            gradient,
        )

    @property
    def _scale(self) -> float:
        return self.parts.vq.num_code_slices**-0.5

    def _gradient_to_tokens(
        self, table: CodeTable, slots: torch.Tensor
    ) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """From the gradient of the scaled sums [T, H] to that of the tokens in the codebook's
        space; None: none."""
        if self.parts.vq.straight_through == "token":
            return lambda grad: self._token_gradient(table, slots, self._scaled(grad))
        if self.parts.vq.straight_through == "group":
            return lambda grad: self._group_gradient(table, slots, self._scaled(grad))
        if self.parts.vq.straight_through == "identity" and self.reads_final_rows:
            return self.parts.assigner.codebook.lower
        return None

    def _scaled(self, grad: torch.Tensor) -> torch.Tensor:
        return grad if self._scale == 1.0 else grad * self._scale

    def _token_gradient(
        self, table: CodeTable, slots: torch.Tensor, grad: torch.Tensor
    ) -> torch.Tensor:
        """grad [T, H] of the tokens' rows -> [T, H] of the tokens."""
        grad = self.table_norm.input_gradient(table.before_norm, slots[:, 0], grad)
        rows = grad.unsqueeze(1).expand(-1, slots.shape[1], -1).reshape(-1, grad.shape[1])
        flat = slots.reshape(-1)
        dx = self._row_gradients(table, self.engine.plan(flat, self.rows.num_slots), rows)
        return self.parts.code_inputs.token_gradient(dx.view(*slots.shape, -1))

    def _group_gradient(
        self, table: CodeTable, slots: torch.Tensor, grad: torch.Tensor
    ) -> torch.Tensor:
        """grad [T, H] of the tokens' rows -> [T, H]: each row's mean over its tokens, J^T of it."""
        num_slots = self.rows.num_slots
        sums = mean_over_tokens(grad, slots, num_slots, self.parts.parts_group)
        every = torch.arange(num_slots, device=slots.device)
        sums = self.table_norm.input_gradient(table.before_norm, every, sums)
        plan = PermutationPlan(every, torch.ones_like(every))
        of_rows = self._row_gradients(table, plan, sums.to(grad.dtype))
        return self.parts.code_inputs.token_gradient(of_rows[slots])

    def _row_gradients(
        self, table: CodeTable, plan: PermutationPlan, rows: torch.Tensor
    ) -> torch.Tensor:
        """rows [R, H], planned over all slots -> J^T of them in the same order, of slice width with
        code vectors as inputs, else [R, H]. Communicates: dispatch and combine."""

        def at_owner(arrived: torch.Tensor, tokens_per_slot: torch.Tensor) -> torch.Tensor:
            local = torch.arange(self.rows.num_local_slots, device=rows.device)
            slots = local.repeat_interleave(tokens_per_slot, output_size=arrived.shape[0])
            dx = self.engine.input_gradient(table.inputs.normed, self.rows, slots, arrived)
            dx = self.parts.input_norm.input_gradient(table.inputs.raw, slots, dx)
            return self.parts.code_inputs.own_gradient(dx, self.rows.local_rows[slots])

        return self.engine.send_gradients(rows, plan, at_owner)


@dataclass(frozen=True)
class TablePart(Part):
    """An output whose rows are final in the table, and are read while they are added."""

    space: CodeSpace
    table: CodeTable
    assignment: Assignment
    dtype: torch.dtype

    def value(self) -> torch.Tensor:
        """As :meth:`CodeSpace.output`."""
        return self.space.output(self.table, self.assignment, self.dtype)

    def added_to(
        self, first: torch.Tensor, p_first: torch.Tensor | None, p: torch.Tensor
    ) -> torch.Tensor:
        """As :meth:`CodeSpace.combined_output`."""
        return self.space.combined_output(self.table, self.assignment, first, (p_first, p))
