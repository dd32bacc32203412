"""A layer's rows, cut over the ranks of their owners.

N experts, R rows, n local experts, B = R / N / E rows of each on one of E expert-tensor ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig

from vqmoe_megatron.moe.memory.row_plan import RowPlaces

INPUT_STD = 1.0  # of learned expert inputs: the scale of normalised hidden states


class RowValues(torch.nn.Module):
    """``weight [n, B, H]``: row ``j N + e`` of the layer is row j of expert e.

    Learned values start at zero, so that a new memory is silent; learned inputs of experts
    (``code_memory.values=experts``) start as normalised hidden states look.
    """

    def __init__(
        self,
        config: TransformerConfig,
        places: RowPlaces,
        pg_collection: ProcessGroupCollection,
        is_input: bool,
        seed: int,
    ) -> None:
        super().__init__()
        self.places, self.pg_collection = places, pg_collection
        self.is_input, self.base_seed = is_input, seed
        self.weight = torch.nn.Parameter(
            torch.zeros(
                *places.local_shape,
                config.hidden_size,
                dtype=config.params_dtype,
                device=torch.cuda.current_device(),
            )
        )
        self.weight.allreduce = False  # reduced over the expert-data-parallel group, as experts are
        # Every rank counts its own rows in the gradient norm.
        set_tensor_model_parallel_attributes(self.weight, True, 1, 1)
        self.set_layer_number(0)

    @torch.no_grad()
    def set_layer_number(self, layer_number: int) -> None:
        """Draw learned inputs by (seed, layer, expert), the same at every layout."""
        if not self.is_input:
            return
        num_experts, block = self.places.local_shape
        first_expert = self.pg_collection.ep.rank() * num_experts
        first_row = self.pg_collection.expt_tp.rank() * block
        rows = self.places.num_rows // self.places.num_experts
        for expert in range(num_experts):
            seed = ((self.base_seed * 1009 + layer_number) * 65_537 + first_expert + expert) % 2**63
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.randn(rows, self.weight.shape[2], generator=generator) * INPUT_STD
            self.weight[expert].copy_(drawn[first_row : first_row + block])

    def forward(self) -> torch.Tensor:
        """``[n * B, H]``. Called as a module, so that Megatron's overlapped gather of parameters
        has finished. No communication."""
        return self.weight.flatten(0, 1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """One global tensor [N, R / N, H], behind the layer axis; no communication."""
        num_prepended = len(sharded_offsets)
        ep, expt_tp = self.pg_collection.ep, self.pg_collection.expt_tp
        offsets = [
            *sharded_offsets,
            (num_prepended, ep.rank(), ep.size()),
            (num_prepended + 1, expt_tp.rank(), expt_tp.size()),
        ]
        key = f"{prefix}weight"
        return {
            key: ShardedTensor.from_rank_offsets(
                key,
                self.weight,
                *offsets,
                replica_id=(0, 0, self.pg_collection.expt_dp.rank()),
                prepend_axis_num=num_prepended,
            )
        }
