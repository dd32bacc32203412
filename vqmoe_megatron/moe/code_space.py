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
from megatron.core.process_groups_config import ProcessGroupCollection

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.moe.code_assigner import Assignment, CodeAssigner
from vqmoe_megatron.moe.code_inputs import LearnedCodeInputs, code_vectors_in_place
from vqmoe_megatron.moe.code_rows import CodeRows, place_code_rows
from vqmoe_megatron.moe.dispatch import combine, dispatch
from vqmoe_megatron.moe.expert_slopes import expert_input_gradient
from vqmoe_megatron.moe.grouped_experts import GroupedExperts, evaluate_experts
from vqmoe_megatron.moe.norms import norm_input_gradient
from vqmoe_megatron.moe.straight_through import mean_over_tokens, with_gradient_to
from vqmoe_megatron.moe.table_combine import combine_with_table
from vqmoe_megatron.moe.table_exchange import gather_table, sum_over_shards
from vqmoe_megatron.vq.permutation import PermutationPlan, plan_permutation
from vqmoe_megatron.vq.segment_sum import sum_looked_up_rows


@dataclass(frozen=True)
class CodeInputs:
    """This rank's rows on their way to the experts."""

    raw: torch.Tensor  # [S, H], before the input norm
    normed: torch.Tensor  # [S, H], what the experts see


@dataclass(frozen=True)
class CodeTable:
    """All rows' outputs, the same on all ranks, and what their gradients need."""

    values: torch.Tensor  # fp32 (fp64) [P * S, H], what tokens read
    before_norm: torch.Tensor  # [P * S, H] without gradient; values without output norm
    inputs: CodeInputs  # without gradient


class CodeSpace:
    """One layer's table: how it is built, read and differentiated. Owns no parameters."""

    def __init__(
        self,
        vq: VQConfig,
        experts: torch.nn.Module,
        assigner: CodeAssigner,
        code_inputs: LearnedCodeInputs | None,
        norms: tuple[torch.nn.Module | None, torch.nn.Module | None],
        pg_collection: ProcessGroupCollection,
    ) -> None:
        self.vq = vq
        self.experts = experts
        self.assigner = assigner
        self.code_inputs = code_inputs
        self.input_norm, self.output_norm = norms
        self.groups = pg_collection.ep, pg_collection.expt_tp
        self.tp_group = pg_collection.tp
        if vq.straight_through in ("token", "group") and not isinstance(experts, GroupedExperts):
            warnings.warn(
                f"vq.straight_through={vq.straight_through}: {type(experts).__name__} does not "
                "show its activations, so its forward pass is repeated on the tokens' rows, twice "
                "the cost of GroupedExperts",
                stacklevel=2,
            )
        self._rows: CodeRows | None = None
        self._rows_version: tuple[int, int] | None = None

    @property
    def rows(self) -> CodeRows:
        """Where every row is evaluated; found again when the code map was replaced."""
        code_map = self.assigner.code_map
        version = (code_map.expert_of_row.data_ptr(), code_map.expert_of_row._version)
        if self._rows is None or version != self._rows_version:
            group = self.groups[0]
            with torch.inference_mode(False):  # kept, and saved for backward passes later
                self._rows = place_code_rows(
                    code_map.expert_of_row, code_map.num_experts, group.size(), group.rank()
                )
            self._rows_version = version
        return self._rows

    @property
    def table_norm(self) -> torch.nn.Module | None:
        """The output norm where it acts on rows of the table: a sum of slices is normed later."""
        return self.output_norm if self.vq.num_code_slices == 1 else None

    # 1.
    def inputs(self, dtype: torch.dtype) -> CodeInputs:
        """Build this rank's expert inputs. No communication."""
        raw = self._raw_inputs(self.rows.local_rows).to(dtype)
        return CodeInputs(raw, raw if self.input_norm is None else self.input_norm(raw))

    def _raw_inputs(self, rows: torch.Tensor) -> torch.Tensor:
        if self.code_inputs is not None:
            return self.code_inputs(rows)
        return code_vectors_in_place(self.assigner.codebook, rows)

    # 2. and 3.
    def evaluate(self, dtype: torch.dtype) -> CodeTable:
        """Build the table with the experts on code rows alone.

        Communicates over the expert-tensor group (one all-reduce) and the expert-parallel group
        (one all-gather), in the backward pass one all-reduce and one reduce-scatter.
        """
        inputs = self.inputs(dtype)
        outputs = evaluate_experts(
            self.experts,
            inputs.normed,
            self.rows.rows_per_local_expert,
            self.rows.rows_per_expert,
        )
        return self.table(inputs, outputs)

    def table(self, inputs: CodeInputs, outputs: torch.Tensor) -> CodeTable:
        """Build the table from this rank's expert outputs ``[S, H]``; communicates as above."""
        ep_group, expt_tp_group = self.groups
        values = gather_table(sum_over_shards(outputs, expt_tp_group), ep_group)
        before_norm = values.detach()
        if self.table_norm is not None:
            values = self.table_norm(values)
        detached = CodeInputs(inputs.raw.detach(), inputs.normed.detach())
        return CodeTable(values, before_norm, detached)

    # 4.
    @property
    def reads_final_rows(self) -> bool:
        """Whether a token's output is its rows' scaled sum, with no norm behind it."""
        return self.output_norm is None or self.table_norm is not None

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
        y_continuous: torch.Tensor,
        weights: tuple[torch.Tensor | None, torch.Tensor],
    ) -> torch.Tensor:
        """The dual path's output; the discrete one is read from the table and never stored.

        Only where :attr:`reads_final_rows`. Communicates as :meth:`output`.
        """
        slots = self.rows.slot_of_row[assignment.rows]
        gradient = self._gradient_to_tokens(table, slots)
        return combine_with_table(
            y_continuous,
            weights,
            table.values,
            slots,
            self._scale,
            assignment.prepared,
            gradient,
        )

    @property
    def _scale(self) -> float:
        return self.vq.num_code_slices**-0.5

    def _gradient_to_tokens(
        self, table: CodeTable, slots: torch.Tensor
    ) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """From the gradient of the scaled sums [T, H] to that of the tokens in the codebook's
        space; None: none."""
        if self.vq.straight_through == "token":
            return lambda grad: self._token_gradient(table, slots, self._scaled(grad))
        if self.vq.straight_through == "group":
            return lambda grad: self._group_gradient(table, slots, self._scaled(grad))
        if self.vq.straight_through == "identity" and self.reads_final_rows:
            return self.assigner.codebook.lower
        return None

    def _scaled(self, grad: torch.Tensor) -> torch.Tensor:
        return grad if self._scale == 1.0 else grad * self._scale

    def _token_gradient(
        self, table: CodeTable, slots: torch.Tensor, grad: torch.Tensor
    ) -> torch.Tensor:
        """grad [T, H] of the tokens' rows -> [T, H] of the tokens."""
        if self.table_norm is not None:
            grad = norm_input_gradient(self.table_norm, table.before_norm, slots[:, 0], grad)
        rows = grad.unsqueeze(1).expand(-1, slots.shape[1], -1).reshape(-1, grad.shape[1])
        flat = slots.reshape(-1)
        dx = self._row_gradients(table, plan_permutation(flat, self.rows.num_slots), rows)
        return self._join_slices(dx.view(*slots.shape, -1))

    def _group_gradient(
        self, table: CodeTable, slots: torch.Tensor, grad: torch.Tensor
    ) -> torch.Tensor:
        """grad [T, H] of the tokens' rows -> [T, H]: each row's mean over its tokens, J^T of it."""
        num_slots = self.rows.num_slots
        sums = mean_over_tokens(grad, slots, num_slots, self.tp_group)
        every = torch.arange(num_slots, device=slots.device)
        if self.table_norm is not None:
            sums = norm_input_gradient(self.table_norm, table.before_norm, every, sums)
        plan = PermutationPlan(every, torch.ones_like(every))
        of_rows = self._row_gradients(table, plan, sums.to(grad.dtype))
        return self._join_slices(of_rows[slots])

    def _row_gradients(
        self, table: CodeTable, plan: PermutationPlan, rows: torch.Tensor
    ) -> torch.Tensor:
        """rows [R, H], planned over all slots -> J^T of them in the same order, of slice width with
        code vectors as inputs, else [R, H]. Communicates: dispatch and combine."""
        arrived, receipt = dispatch(rows, plan, *self.groups)
        local = torch.arange(self.rows.num_local_slots, device=rows.device)
        slots = local.repeat_interleave(
            receipt.tokens_per_local_expert, output_size=arrived.shape[0]
        )
        dx = expert_input_gradient(self.experts, table.inputs.normed, self.rows, slots, arrived)
        if self.input_norm is not None:
            dx = norm_input_gradient(self.input_norm, table.inputs.raw, slots, dx)
        if self.code_inputs is None and self.vq.num_code_slices > 1:
            own_slice = (self.rows.local_rows // self.vq.num_codes)[slots]
            dx = dx.unflatten(1, (self.vq.num_code_slices, -1))  # no row may have arrived
            dx = dx[torch.arange(dx.shape[0], device=dx.device), own_slice]
        if self.code_inputs is None:
            dx = self.assigner.codebook.lower(dx)
        return combine(dx, receipt, *self.groups)[0]

    def _join_slices(self, dx: torch.Tensor) -> torch.Tensor:
        """[T, C, D or H] -> [T, H or D], of the tokens in the codebook's space."""
        if self.code_inputs is None:
            return dx.flatten(1)
        return self.assigner.codebook.lower(dx.sum(dim=1))
