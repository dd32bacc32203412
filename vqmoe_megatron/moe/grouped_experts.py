"""The experts: n MLPs evaluated together on rows sorted by expert.

R rows, H hidden size, F expert hidden size, n local experts, N experts, G = 2 for gated experts
else 1.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import get_expert_parallel_rng_tracker_name
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from vqmoe_megatron.moe.expert_gemm import grouped_linear


class GroupedExperts(MegatronModule):
    """Drop-in for Megatron's ``SequentialMLP`` with stacked weights and one grouped GEMM per layer.

    fc1 [n, G F, H] -> activation (gated: act(first half) * second half) -> fc2 [n, H, F].
    Checkpoints interchange with ``SequentialMLP``: same keys, same global tensors. Only its empty
    ``_extra_state`` entries are missing here, so a load into it must not be strict about those.

    Raises:
        ValueError: for expert tensor parallelism, which this module does not shard.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: object = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        if pg_collection is None:
            raise ValueError("GroupedExperts needs the process groups of its MoE layer")
        if pg_collection.expt_tp.size() > 1:
            raise ValueError(
                f"expert_tensor_parallel_size={pg_collection.expt_tp.size()}: GroupedExperts "
                "shards "
                "over expert_model_parallel_size only; set expert_tensor_parallel_size=1"
            )
        self.num_local_experts = num_local_experts
        self.ep_group = pg_collection.ep
        self.expt_dp_group = pg_collection.expt_dp
        hidden, ffn = config.hidden_size, config.moe_ffn_hidden_size
        fc1_width = ffn * (2 if config.gated_linear_unit else 1)
        self.weight1 = self._parameter(num_local_experts, fc1_width, hidden)
        self.weight2 = self._parameter(num_local_experts, hidden, ffn)
        if config.add_bias_linear:
            self.bias1 = self._parameter(num_local_experts, fc1_width)
            self.bias2 = self._parameter(num_local_experts, hidden)
        else:
            self.register_parameter("bias1", None)
            self.register_parameter("bias2", None)
        if config.perform_initialization:
            with tensor_parallel.get_cuda_rng_tracker().fork(
                get_expert_parallel_rng_tracker_name()
            ):
                for expert in range(num_local_experts):
                    config.init_method(self.weight1.data[expert])
                    config.output_layer_init_method(self.weight2.data[expert])

    def _parameter(self, *shape: int) -> torch.nn.Parameter:
        parameter = torch.nn.Parameter(
            torch.zeros(*shape, dtype=self.config.params_dtype, device=torch.cuda.current_device())
        )
        # Expert gradients reduce over the expert-data-parallel group. Megatron marks experts so
        # only when EP > 1, which loses their reduction over TP ranks at EP = 1 with TP > ETP.
        parameter.allreduce = False
        return parameter

    def forward(
        self,
        permuted_local_hidden_states: torch.Tensor,
        tokens_per_expert: torch.Tensor,
        permuted_probs: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, None]:
        """Evaluate the local experts.

        Args:
            permuted_local_hidden_states: ``[R, H]``, sorted by local expert.
            tokens_per_expert: integer ``[n]``.
            permuted_probs: ``[R]`` weights of the outputs, or None for weight one.

        Returns:
            ``([R, H], None)``; biases are added inside. No communication.
        """
        rows = permuted_local_hidden_states
        counts = tokens_per_expert.to(rows.device)
        hidden = grouped_linear(rows, self.weight1, counts)
        hidden = self._add_bias(hidden, self.bias1, counts)
        if self.config.gated_linear_unit:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = self.config.activation_func(gate) * up
        else:
            hidden = self.config.activation_func(hidden)
        output = grouped_linear(hidden, self.weight2, counts)
        output = self._add_bias(output, self.bias2, counts)
        if permuted_probs is not None:
            output = (output * permuted_probs.unsqueeze(-1)).to(output.dtype)
        return output, None

    @staticmethod
    def _add_bias(
        rows: torch.Tensor, bias: torch.nn.Parameter | None, counts: torch.Tensor
    ) -> torch.Tensor:
        if bias is None:
            return rows
        return rows + bias.repeat_interleave(counts, dim=0, output_size=rows.shape[0])

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Map the stacked tensors onto the keys that ``SequentialMLP`` writes.

        ``experts.linear_fc1.weight`` has the global shape [N, G F, H] (behind the layer axis).
        """
        num_prepended = len(sharded_offsets)
        sharded = {}
        for name, key in (
            ("weight1", "linear_fc1.weight"),
            ("bias1", "linear_fc1.bias"),
            ("weight2", "linear_fc2.weight"),
            ("bias2", "linear_fc2.bias"),
        ):
            parameter = getattr(self, name)
            if parameter is not None:
                sharded[f"{prefix}{name}"] = ShardedTensor.from_rank_offsets(
                    f"{prefix}experts.{key}",
                    parameter,
                    *sharded_offsets,
                    (num_prepended, self.ep_group.rank(), self.ep_group.size()),
                    replica_id=(0, 0, self.expt_dp_group.rank()),
                    prepend_axis_num=num_prepended,
                )
        return sharded
