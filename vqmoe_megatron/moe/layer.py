"""The VQMoE layer: y = p_c * y_continuous + p_d * y_discrete, both over the same experts.

S sequence length, B batch, T = S * B local tokens, H hidden size, k selected experts of the
continuous path, C codes of the discrete path, R = T (k + C) rows, N experts.

1. Continuous path: Megatron's TopKRouter selects k experts and their weights.
2. Discrete path: the codebook assigns C codes; code -> expert.
3. Token dispatch: C rows per token join the continuous ones. Code space: the experts' own code rows
   do, which never travel (``code_space``). Either way one permutation plan, one all-to-all each way
   and one grouped GEMM serve both paths; under expert tensor parallelism also one gather and one
   reduce-scatter. A discrete path alone in code space, or with one table per step, needs none of
   it.
4. Continuous rows are summed with the router's weights, discrete rows with weight 1 / sqrt(C).
5. The combine gate weighs the two outputs; VQ losses and statistics ride on the result.

The method is that of arXiv 2411.19402, sections 3.1-3.3.
"""

from __future__ import annotations

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.moe.backward_hook import run_in_backward
from vqmoe_megatron.moe.code_assigner import Assignment, CodeAssigner
from vqmoe_megatron.moe.code_inputs import LearnedCodeInputs
from vqmoe_megatron.moe.code_space import CodeInputs, CodeSpace
from vqmoe_megatron.moe.combine_gate import CombineGate, weighted_sum
from vqmoe_megatron.moe.discrete_input import discrete_rows
from vqmoe_megatron.moe.dispatch import ResidentRows, combine, dispatch
from vqmoe_megatron.moe.foreign_loop import follow
from vqmoe_megatron.moe.grouped_experts import evaluate_experts
from vqmoe_megatron.moe.layer_step import LayerStep
from vqmoe_megatron.moe.megatron_settings import (
    check_layer_number,
    check_layer_settings,
)
from vqmoe_megatron.moe.norms import ParallelNorm
from vqmoe_megatron.moe.step_table import StepTable
from vqmoe_megatron.moe.straight_through import with_gradient_to
from vqmoe_megatron.vq.permutation import plan_permutation
from vqmoe_megatron.vq.segment_sum import count_ids


class VQMoELayer(LayerStep, MoELayer):
    """A Megatron MoE layer with a discrete path beside the learned router.

    Args:
        config, submodules, layer_number, pg_collection: as Megatron passes them.
        vq: settings; None takes the defaults with K = 4 N.
        seed: of codebook initialisation and revival, the same on all ranks.
        on_every_stage: whether every pipeline stage holds such layers, so that their metrics may be
            summed over stages for Megatron's log.
        of_newer_megatron: what newer Megatrons pass to a MoE layer besides; theirs takes it.

    Raises:
        ValueError: for a Megatron feature this layer does not compose with; the message names it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        vq: VQConfig | None = None,
        seed: int = 1234,
        on_every_stage: bool = False,
        **of_newer_megatron: object,
    ) -> None:
        vq = vq or VQConfig(num_codes=4 * config.num_moe_experts)
        check_layer_settings(config, vq)
        pg_collection = pg_collection or get_default_pg_collection()
        super().__init__(config, submodules, layer_number, pg_collection, **of_newer_megatron)
        # Newer Megatrons number the layers of multi-token prediction from 1 again.
        self.num_layers_before = config.num_layers if of_newer_megatron.get("is_mtp_layer") else 0
        self.on_every_stage = on_every_stage
        self.pg_collection = pg_collection
        self.expt_tp_group = pg_collection.expt_tp
        self.vq = vq
        self.token_dispatcher = None  # Megatron's is not used: rows of both paths travel together
        self.assigner = self.gate = self.input_norm = self.output_norm = self.code_inputs = None
        self.code_space = self.step_table = None
        if self.vq.path == "discrete":
            self.router = None
        if self.vq.path != "continuous":
            self._build_discrete_path(config, pg_collection, seed)
        if self.vq.path == "dual":
            self.gate = CombineGate(config, self.vq)
        device = torch.cuda.current_device()
        num_experts = config.num_moe_experts
        self.register_buffer(
            "step_expert_load", torch.zeros(num_experts, device=device), persistent=False
        )
        self.register_buffer("step_gate", torch.zeros(2, device=device), persistent=False)
        if layer_number is not None:
            self.set_layer_number(layer_number)

    def _build_discrete_path(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection, seed: int
    ) -> None:
        self.assigner = CodeAssigner(config, self.vq, pg_collection, seed)
        if self.vq.code_input == "learned":
            self.code_inputs = LearnedCodeInputs(config, self.vq, seed)
        norm_size = config.hidden_size, config.layernorm_epsilon
        if self.vq.norm != "none":
            self.input_norm = ParallelNorm(config, *norm_size)
        if self.vq.norm == "separate":
            self.output_norm = ParallelNorm(config, *norm_size)
        if self.vq.in_code_space:
            norms = self.input_norm, self._discrete_output_norm
            self.code_space = CodeSpace(
                self.vq, self.experts, self.assigner, self.code_inputs, norms, pg_collection
            )
        if self.vq.table_per_step:
            self.step_table = StepTable(self.code_space.evaluate, self._table_weights)

    def _table_weights(self) -> list[torch.Tensor]:
        parts = (self.experts, self.input_norm, self.output_norm, self.code_inputs)
        weights = [p for part in parts if part is not None for p in part.parameters()]
        return [*weights, self.assigner.codebook.codes]

    @property
    def _discrete_output_norm(self) -> torch.nn.Module | None:
        return self.input_norm if self.vq.norm == "shared" else self.output_norm

    def set_layer_number(self, layer_number: int) -> None:
        """Called by the transformer layer; decides this layer's random choices.

        Raises:
            ValueError: where Megatron's ``moe_layer_freq`` wants a dense layer.
        """
        self.layer_number = layer_number + self.num_layers_before
        check_layer_number(self.config, self.layer_number)
        if self.router is not None:
            self.router.set_layer_number(layer_number)
        for part in (self.assigner, self.code_inputs):
            if part is not None:
                part.set_layer_number(self.layer_number)

    def train(self, mode: bool = True) -> VQMoELayer:
        """Switch between training and evaluation; a kept table is forgotten.

        Raises:
            ValueError: in the middle of a step with one table, whose gradient would be lost.
        """
        if self.step_table is not None and mode != self.training:
            self.step_table.leave()
        elif self.step_table is not None and not mode:
            self.step_table.clear()  # evaluation announced again: the weights may be others
        return super().train(mode)

    def forward(
        self,
        hidden_states: torch.Tensor,
        intermediate_tensors: object = None,
        padding_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, None]:
        """Evaluate the layer on hidden states ``[S, B, H]`` (S is the local shard under SP).

        Returns ``([S, B, H], None)``; no bias is left for the caller to add.

        Communicates over the expert-parallel and expert-tensor groups (dispatch), over ``tp_cp``
        when the balance loss is on (Megatron's router), and once over ``tp_dp_cp`` to initialise
        the codebook.

        Raises:
            ValueError: for a padding mask, torch.autocast, TP > 1 in training without sequence
                parallelism, or a training loop whose steps cannot be followed (``foreign_loop``).
        """
        if padding_mask is not None or intermediate_tensors is not None:
            raise ValueError("VQMoELayer takes no padding mask and no captured CUDA graph tensors")
        if torch.is_autocast_enabled(hidden_states.device.type):
            raise ValueError(
                "VQMoELayer does not run under torch.autocast, which casts its inputs and not its "
                "experts; use Megatron's own mixed precision (bf16=True and Float16Module)"
            )
        if self.training and self.tp_group.size() > 1 and not self.config.sequence_parallel:
            raise ValueError("training with TP > 1 needs sequence_parallel=True in a MoE layer")
        if self.training:
            follow(self, self.config)
        if self.moe_layer_recompute:
            return tensor_parallel.checkpoint(self._evaluate, False, hidden_states), None
        return self._evaluate(hidden_states), None

    def _evaluate(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])  # [T, H]
        probs = selected = assignment = table = None
        rows, experts = [], []  # of each path: [T, k or C, H] and int64 [T, k or C]
        if self.router is not None:  # 1. continuous path
            probs, selected = self._select(hidden_states)  # [T, k] twice
            rows.append(x.unsqueeze(1).expand(-1, selected.shape[1], -1))
            experts.append(selected)
        if self.assigner is not None:  # 2. discrete path
            had_codes = not self.assigner.codebook.needs_data_init
            assignment = self.assigner(x)
            if self.step_table is not None and not had_codes:
                self.step_table.clear()  # of the codes before data came
            if self.code_space is None:
                sent = discrete_rows(
                    x, assignment, self.assigner.codebook, self.code_inputs, self.vq, self.tp_group
                )
                rows.append(sent if self.input_norm is None else self.input_norm(sent))
                experts.append(assignment.experts)

        outputs = []  # 3. [T, k or C, H] of each path whose rows travelled
        if self.step_table is not None and (self.training or not torch.is_grad_enabled()):
            table = self.step_table.get(self.training, x.dtype)
        elif self.code_space is not None and not rows:
            table = self.code_space.evaluate(x.dtype)
        if rows:
            codes = assignment.rows if assignment is not None and len(rows) == 2 else None
            wants_table = self.code_space is not None and table is None
            code_rows = self.code_space.inputs(x.dtype) if wants_table else None
            outputs, code_outputs = self._run_experts(rows, experts, codes, code_rows)
            if wants_table:
                table = self.code_space.table(code_rows, code_outputs)

        y_continuous = y_discrete = None
        if probs is not None:  # 4.
            y_continuous = _sum_slots(outputs.pop(0) * probs.unsqueeze(-1)).to(x.dtype)
        is_read_while_combined = (
            table is not None and y_continuous is not None and self.code_space.reads_final_rows
        )
        if table is not None and not is_read_while_combined:
            y_discrete = self.code_space.output(table, assignment, x.dtype)
        elif outputs:
            y_discrete = _sum_slots(outputs.pop(0)) / self.vq.num_code_slices**0.5
        if y_discrete is not None:
            y_discrete = self._finish_discrete(y_discrete, assignment).to(x.dtype)

        weights = None if self.gate is None else self.gate(x)  # 5.
        if is_read_while_combined:
            output = self.code_space.combined_output(table, assignment, y_continuous, weights)
        elif weights is not None:
            output = weighted_sum(y_continuous, y_discrete, weights)
        else:
            output = y_continuous if y_discrete is None else y_discrete
        load = [selected] if selected is not None else []
        if assignment is not None:
            output = self.assigner.attach(output, assignment)
            load.append(assignment.experts)
        weight = None if weights is None else weights[1]
        output = self._attach_load(output, torch.cat([e.reshape(-1) for e in load]), weight)
        return output.view_as(hidden_states)

    def _select(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Router probabilities and experts of the k selected experts, ``[T, k]`` each.

        A token that Megatron's capacity rule dropped keeps k rows; their weight is zero.
        """
        probs, routing_map = self.route(hidden_states)
        k = self.config.moe_router_topk
        selected = routing_map.to(torch.float32).add(probs.detach()).topk(k, dim=1).indices
        return probs.gather(1, selected), selected

    def _run_experts(
        self,
        rows: list[torch.Tensor],
        experts: list[torch.Tensor],
        codes: torch.Tensor | None,
        code_rows: CodeInputs | None,
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Evaluate travelling rows of each path, and this rank's own code rows along with them.

        ``codes`` [T, C] orders the last path's rows within their expert, behind the continuous
        ones; ``code_rows`` is None where no table is wanted.
        """
        sizes = [part.shape[:2] for part in rows]
        parts = [part.reshape(-1, part.shape[-1]) for part in rows]
        flat = torch.cat(parts) if len(parts) > 1 else parts[0]  # [R, H]
        plan = plan_permutation(
            torch.cat([e.reshape(-1) for e in experts]),
            self.config.num_moe_experts,
            self._order_within_expert(experts, codes),
        )
        residents = None
        if code_rows is not None:
            rows_per_expert = self.code_space.rows.rows_per_local_expert
            residents = ResidentRows(code_rows.normed, rows_per_expert)
        groups = self.ep_group, self.expt_tp_group
        arrived, receipt = dispatch(flat, plan, *groups, residents)
        evaluated = evaluate_experts(self.experts, arrived, receipt.tokens_per_local_expert)
        returned, code_outputs = combine(evaluated, receipt, *groups)
        parts = returned.split([t * c for t, c in sizes]) if len(sizes) > 1 else [returned]
        outputs = [part.view(*size, -1) for part, size in zip(parts, sizes, strict=True)]
        return outputs, code_outputs

    @staticmethod
    def _order_within_expert(
        experts: list[torch.Tensor], codes: torch.Tensor | None
    ) -> torch.Tensor | None:
        if codes is None:
            return None
        ranks = [torch.zeros_like(e) for e in experts[:-1]] + [codes + 1]
        return torch.cat([rank.reshape(-1) for rank in ranks])

    def _finish_discrete(self, y: torch.Tensor, assignment: Assignment) -> torch.Tensor:
        """[T, H]: output norm and the identity's gradient, unless the table's rows are final."""
        if self.code_space is not None and self.code_space.reads_final_rows:
            return y
        if self._discrete_output_norm is not None:
            y = self._discrete_output_norm(y)
        if self.vq.straight_through == "identity" and self.vq.expert_input == "code":
            y = with_gradient_to(y, assignment.prepared, self.assigner.codebook.lower)
        return y

    def _attach_load(
        self, output: torch.Tensor, experts: torch.Tensor, weight: torch.Tensor | None
    ) -> torch.Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return output

        num_tokens = float(output.shape[0])  # the output itself must not be kept

        def record() -> None:
            num_experts = self.config.num_moe_experts
            self.step_expert_load += count_ids(experts, num_experts)
            discrete = self.step_gate.new_tensor(
                0.0 if self.vq.path == "continuous" else num_tokens
            )
            if weight is not None:
                discrete = weight.detach().float().sum()
            self.step_gate += torch.stack([discrete, self.step_gate.new_tensor(num_tokens)])
            self.recorded()

        return run_in_backward(output, record)


def _sum_slots(rows: torch.Tensor) -> torch.Tensor:
    """[T, k, H] -> [T, H]; one slot needs no sum."""
    return rows.squeeze(1) if rows.shape[1] == 1 else rows.sum(dim=1)
