"""The VQMoE layer: y = p_c * y_continuous + p_d * y_discrete, both over the same experts.

S sequence length, B batch, T = S * B local tokens, H hidden size, k selected experts of the
continuous path, C codes of the discrete path, R = T (k + C) rows, N experts.

1. Continuous path: Megatron's TopKRouter selects k experts and their weights.
2. Discrete path: the codebook assigns C codes; code -> expert; ``discrete_input`` builds C rows.
3. The rows of both paths are one set [R, H]: one permutation plan, one all-to-all each way, one
   grouped GEMM; under expert tensor parallelism also one gather and one reduce-scatter.
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
from vqmoe_megatron.moe.combine_gate import CombineGate
from vqmoe_megatron.moe.discrete_input import discrete_input
from vqmoe_megatron.moe.dispatch import combine, dispatch
from vqmoe_megatron.moe.norms import ParallelNorm
from vqmoe_megatron.vq.permutation import plan_permutation


class VQMoELayer(MoELayer):
    """A Megatron MoE layer with a discrete path beside the learned router.

    Raises:
        ValueError: for a Megatron feature this layer does not compose with; the message names it.
    """

    step_expert_load: torch.Tensor  # fp32 [N], this step's rows per expert, both paths
    step_gate: torch.Tensor  # fp32 [2]: sum over tokens of the discrete weight, tokens

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        vq: VQConfig | None = None,
        seed: int = 1234,
    ) -> None:
        _check_config(config)
        pg_collection = pg_collection or get_default_pg_collection()
        super().__init__(config, submodules, layer_number, pg_collection)
        self.expt_tp_group = pg_collection.expt_tp
        self.vq = vq or VQConfig(num_codes=4 * config.num_moe_experts)
        self.token_dispatcher = None  # Megatron's is not used: rows of both paths travel together
        self.assigner = self.gate = self.input_norm = self.output_norm = None
        if self.vq.path == "discrete":
            self.router = None
        if self.vq.path != "continuous":
            self.assigner = CodeAssigner(config, self.vq, pg_collection, seed)
            if self.vq.norm != "none":
                self.input_norm = ParallelNorm(config, config.hidden_size, config.layernorm_epsilon)
            if self.vq.norm == "separate":
                self.output_norm = ParallelNorm(
                    config, config.hidden_size, config.layernorm_epsilon
                )
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

    def set_layer_number(self, layer_number: int) -> None:
        """Called by the transformer layer; decides this layer's random choices."""
        self.layer_number = layer_number
        for part in (self.router, self.assigner):
            if part is not None:
                part.set_layer_number(layer_number)

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
            ValueError: for a padding mask, or TP > 1 in training without sequence parallelism.
        """
        if padding_mask is not None or intermediate_tensors is not None:
            raise ValueError("VQMoELayer takes no padding mask and no captured CUDA graph tensors")
        if self.training and self.tp_group.size() > 1 and not self.config.sequence_parallel:
            raise ValueError("training with TP > 1 needs sequence_parallel=True in a MoE layer")
        if self.moe_layer_recompute:
            return tensor_parallel.checkpoint(self._evaluate, False, hidden_states), None
        return self._evaluate(hidden_states), None

    def _evaluate(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])  # [T, H]
        rows, experts, codes = [], [], []  # of each path: [T, k or C, H], int64 [T, k or C] twice
        probs = assignment = None

        if self.router is not None:  # 1. continuous path
            probs, selected = self._select(hidden_states)  # [T, k] twice
            rows.append(x.unsqueeze(1).expand(-1, selected.shape[1], -1))
            experts.append(selected)
            codes.append(torch.zeros_like(selected))
        if self.assigner is not None:  # 2. discrete path
            assignment = self.assigner(x)
            is_token = self.vq.expert_input == "token"  # as it came, also for cosine codes
            discrete = discrete_input(
                x if is_token else assignment.prepared, assignment.quantized, self.vq
            )
            rows.append(discrete if self.input_norm is None else self.input_norm(discrete))
            experts.append(assignment.experts)
            codes.append(assignment.rows + 1)  # behind the expert's continuous rows

        outputs = self._run_experts(rows, experts, codes)  # 3. [T, k or C, H] of each path

        y_continuous = y_discrete = weight = None
        if probs is not None:  # 4.
            y_continuous = (outputs.pop(0) * probs.unsqueeze(-1)).sum(dim=1).to(x.dtype)
        if assignment is not None:
            y_discrete = self._discrete_output(outputs.pop(0), assignment, x)

        if y_discrete is None:  # 5.
            output = y_continuous
        elif y_continuous is None:
            output = y_discrete
        else:
            output, weight = self.gate(x, y_continuous, y_discrete)
        if assignment is not None:
            output = self.assigner.attach(output, assignment)
        output = self._attach_load(output, torch.cat([e.reshape(-1) for e in experts]), weight)
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
        codes: list[torch.Tensor],
    ) -> list[torch.Tensor]:
        sizes = [part.shape[:2] for part in rows]
        flat = torch.cat([part.reshape(-1, part.shape[-1]) for part in rows])  # [R, H]
        plan = plan_permutation(
            torch.cat([e.reshape(-1) for e in experts]),
            self.config.num_moe_experts,
            torch.cat([c.reshape(-1) for c in codes]),
        )
        groups = self.ep_group, self.expt_tp_group
        arrived, receipt = dispatch(flat, plan, *groups)
        evaluated, _ = self.experts(arrived, receipt.tokens_per_local_expert, None)
        returned = combine(evaluated, receipt, *groups)
        parts = returned.split([t * c for t, c in sizes])
        return [part.view(*size, -1) for part, size in zip(parts, sizes, strict=True)]

    def _discrete_output(
        self, outputs: torch.Tensor, assignment: Assignment, x: torch.Tensor
    ) -> torch.Tensor:
        """outputs [T, C, H] -> [T, H]: scaled sum over codes, norm, identity gradient."""
        y = outputs.sum(dim=1) / self.vq.num_code_slices**0.5
        if self.vq.norm == "separate":
            y = self.output_norm(y)
        elif self.vq.norm == "shared":
            y = self.input_norm(y)
        if self.vq.straight_through == "identity" and self.vq.expert_input == "code":
            y = y + (assignment.prepared - assignment.prepared.detach())
        return y.to(x.dtype)

    def _attach_load(
        self, output: torch.Tensor, experts: torch.Tensor, weight: torch.Tensor | None
    ) -> torch.Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return output

        def record() -> None:
            num_experts = self.config.num_moe_experts
            self.step_expert_load += torch.bincount(experts, minlength=num_experts)
            num_tokens = float(output.shape[0])
            discrete = self.step_gate.new_tensor(
                0.0 if self.vq.path == "continuous" else num_tokens
            )
            if weight is not None:
                discrete = weight.detach().float().sum()
            self.step_gate += torch.stack([discrete, self.step_gate.new_tensor(num_tokens)])

        return run_in_backward(output, record)


def _check_config(config: TransformerConfig) -> None:
    unsupported = {
        "moe_shared_expert_intermediate_size": config.moe_shared_expert_intermediate_size,
        "moe_latent_size": getattr(config, "moe_latent_size", None),
        "fp8": config.fp8,
        "moe_apply_probs_on_input": config.moe_apply_probs_on_input,
        "moe_input_jitter_eps": config.moe_input_jitter_eps,
    }
    for name, value in unsupported.items():
        if value:
            raise ValueError(f"VQMoELayer does not support {name}={value}; leave it unset")
