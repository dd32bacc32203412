"""The experts: n MLPs evaluated together on rows sorted by expert.

R rows, H hidden size, F expert hidden size, n local experts, N experts, G = 2 for gated experts
else 1, E expert-tensor ranks. Rank e of them holds the e-th of E equal cuts of F; for gated experts
of both halves, so that its fc1 is [gate cut; up cut].
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import (
    ReplicaId,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import get_expert_parallel_rng_tracker_name
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from vqmoe_megatron.moe.expert_gemm import grouped_linear
from vqmoe_megatron.moe.megatron_settings import check_expert_settings
from vqmoe_megatron.plan.rules import expert_width_errors


class GroupedExperts(MegatronModule):
    """Drop-in for Megatron's ``SequentialMLP`` with stacked weights and one grouped GEMM per layer.

    fc1 [n, G F / E, H] -> activation (gated: act(first half) * second half) -> fc2 [n, H, F / E].
    Checkpoints interchange with ``SequentialMLP`` and between values of E: same keys, same global
    tensors. Only its empty ``_extra_state`` entries are missing here, so a load into it must not be
    strict about those.

    ``matmul`` is one product per expert (:func:`grouped_linear`); a simulation has another.

    Raises:
        ValueError: without process groups, for a setting of Megatron's that it would not honour,
            when E does not divide F, or for a width that torch's grouped GEMM cannot take.
    """

    matmul = staticmethod(grouped_linear)

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: object = None,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,  # of the module, from newer Megatrons
    ) -> None:
        super().__init__(config=config)
        if pg_collection is None:
            raise ValueError("GroupedExperts needs the process groups of its MoE layer")
        self.num_local_experts = num_local_experts
        self.ep_group = pg_collection.ep
        self.expt_tp_group = pg_collection.expt_tp
        self.expt_dp_group = pg_collection.expt_dp
        check_expert_settings(config)
        num_shards = self.expt_tp_group.size()
        hidden, ffn = config.hidden_size, config.moe_ffn_hidden_size
        element_bytes = config.params_dtype.itemsize
        for error in expert_width_errors(hidden, ffn, element_bytes, num_shards):
            raise ValueError(error)
        self.num_halves = 2 if config.gated_linear_unit else 1  # G
        width = ffn // num_shards
        fc1_width = self.num_halves * width
        self.weight1 = self._parameter(num_local_experts, fc1_width, hidden)
        self.weight2 = self._parameter(num_local_experts, hidden, width)
        # As Megatron marks shards: every rank counts its own in the gradient norm. bias2 is a
        # replica on the expert-tensor ranks and is counted on the first; with one such rank it is
        # whole on every tensor-parallel rank, which must not leave it out either.
        set_tensor_model_parallel_attributes(self.weight1, True, 1, self.num_halves)
        set_tensor_model_parallel_attributes(self.weight2, True, 2, 1)
        if config.add_bias_linear:
            self.bias1 = self._parameter(num_local_experts, fc1_width)
            self.bias2 = self._parameter(num_local_experts, hidden)
            set_tensor_model_parallel_attributes(self.bias1, True, 1, self.num_halves)
            set_tensor_model_parallel_attributes(self.bias2, num_shards == 1, 1, 1)
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
        equal_count: int | None = None,
    ) -> tuple[torch.Tensor, None]:
        """Evaluate the local experts.

        Args:
            permuted_local_hidden_states: ``[R, H]``, sorted by local expert.
            tokens_per_expert: integer ``[n]``.
            permuted_probs: ``[R]`` weights of the outputs, or None for weight one.
            equal_count: R / n where the host knows that all experts have so many rows.

        Returns:
            ``([R, H], None)``; biases are added inside. At E > 1 this rank's part of the outputs:
            their sum over the expert-tensor ranks, which must all get the same rows, is the
            result, as the sum of the gradients they return is that of rows and weights. No
            communication.
        """
        rows = permuted_local_hidden_states
        counts = tokens_per_expert.to(rows.device)
        hidden = self.matmul(rows, self.weight1, counts, equal_count)
        hidden = self.activate(self.add_bias(hidden, self.bias1, counts))
        output = self.matmul(hidden, self.weight2, counts, equal_count)
        output = self.add_bias(output, self._bias2_part(), counts)
        if permuted_probs is not None:
            output = (output * permuted_probs.unsqueeze(-1)).to(output.dtype)
        return output, None

    def _bias2_part(self) -> torch.Tensor | None:
        """The output bias once in the sum of the parts, with its whole gradient on every rank.

        All expert-tensor ranks see all rows, hence equal gradients: their replicas of bias2 stay
        bit-equal without a reduction.
        """
        if self.bias2 is None or self.expt_tp_group.rank() == 0:
            return self.bias2
        return self.bias2 - self.bias2.detach()

    def activate(self, hidden: torch.Tensor) -> torch.Tensor:
        """fc1 outputs ``[R, G F / E]`` -> fc2 inputs ``[R, F / E]``.

        ``activation_func_clamp_value`` and ``glu_linear_offset`` are for gated experts, as in
        Megatron's ``SequentialMLP`` (transformer/mlp.py).
        """
        config = self.config
        if not config.gated_linear_unit:
            return config.activation_func(hidden)
        gate, up = hidden.chunk(2, dim=-1)
        if (limit := config.activation_func_clamp_value) is not None:
            gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
        if config.glu_linear_offset:
            up = up + config.glu_linear_offset
        return config.activation_func(gate) * up

    @staticmethod
    def add_bias(
        rows: torch.Tensor, bias: torch.Tensor | None, counts: torch.Tensor
    ) -> torch.Tensor:
        """Add each expert's bias ``[n, O]`` to its rows ``[R, O]``, sorted by expert."""
        if bias is None:
            return rows
        if bias.shape[0] == 1:
            return rows + bias
        return rows + bias.repeat_interleave(counts, dim=0, output_size=rows.shape[0])

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Map the stacked tensors onto the keys that ``SequentialMLP`` writes.

        ``experts.linear_fc1.weight`` has the global shape [N, G F, H] (behind the layer axis). No
        communication.
        """
        sharded = {}
        for name, key, shard_axis in (
            ("weight1", "linear_fc1.weight", 1),
            ("bias1", "linear_fc1.bias", 1),
            ("weight2", "linear_fc2.weight", 2),
            ("bias2", "linear_fc2.bias", None),
        ):
            parameter = getattr(self, name)
            if parameter is not None:
                num_pieces = self.num_halves if name in ("weight1", "bias1") else 1
                sharded[f"{prefix}{name}"] = self._sharded_parameter(
                    f"{prefix}experts.{key}", parameter, shard_axis, num_pieces, sharded_offsets
                )
        return sharded

    def _sharded_parameter(
        self,
        key: str,
        parameter: torch.nn.Parameter,
        shard_axis: int | None,
        num_pieces: int,
        sharded_offsets: tuple,
    ) -> ShardedTensor | ShardedTensorFactory:
        """Place a stacked parameter in its global tensor.

        ``shard_axis`` is cut over the expert-tensor ranks (None: replicas), in ``num_pieces`` equal
        pieces along it each. The shards of gated experts have two, which do not touch each other
        globally: a factory places each and joins them after a load.
        """
        num_prepended = len(sharded_offsets)
        shard, num_shards = self.expt_tp_group.rank(), self.expt_tp_group.size()
        experts = (num_prepended, self.ep_group.rank(), self.ep_group.size())
        replica = 0 if shard_axis is not None else shard
        replica_id = (0, replica, self.expt_dp_group.rank())
        if num_shards == 1:
            num_pieces = 1  # one rank's pieces are the whole axis

        def place(key: str, part: torch.Tensor, replica_id: ReplicaId, piece: int) -> ShardedTensor:
            offsets = [*sharded_offsets, experts]
            if shard_axis is not None:
                first = piece * num_shards + shard
                offsets.append((num_prepended + shard_axis, first, num_pieces * num_shards))
            return ShardedTensor.from_rank_offsets(
                key, part, *offsets, replica_id=replica_id, prepend_axis_num=num_prepended
            )

        if num_pieces == 1:
            return place(key, parameter, replica_id, 0)

        def build(
            key: str, tensor: torch.Tensor, replica_id: ReplicaId, flattened_range: slice | None
        ) -> list[ShardedTensor]:
            pieces = tensor.chunk(num_pieces, dim=shard_axis)
            return [place(key, part, replica_id, piece) for piece, part in enumerate(pieces)]

        def merge(pieces: list[torch.Tensor]) -> torch.Tensor:
            return torch.cat(pieces, dim=shard_axis)

        return ShardedTensorFactory(key, parameter, build, merge, replica_id)


def evaluate_experts(
    experts: torch.nn.Module,
    rows: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    equal_count: int | None = None,
) -> torch.Tensor:
    """Outputs ``[R, H]`` of rows sorted by local expert, with weight one.

    Megatron's own expert modules always multiply by weights; :class:`GroupedExperts` need none.
    """
    if isinstance(experts, GroupedExperts):
        return experts(rows, tokens_per_expert, None, equal_count)[0]
    weights = torch.ones(rows.shape[0], dtype=rows.dtype, device=rows.device)
    return experts(rows, tokens_per_expert, weights)[0]
