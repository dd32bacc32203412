"""Which expert-parallel rank owns which experts, and with them which codes.

N experts in contiguous blocks; code rows are numbered slice * K + code, and under the mod map row r
belongs to expert r mod N. The maps balanced and clustered are fixed from the first data: how many
rows a rank gets is known before, which ones is not.
"""

from __future__ import annotations

from dataclasses import dataclass

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.plan.layer_shape import LayerShape
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.plan.ownership import experts_of_rank


@dataclass(frozen=True)
class CodeOwner:
    """One expert-parallel rank; the ranks with this coordinate hold the same experts."""

    expert_parallel_rank: int
    first_expert: int
    last_expert: int
    num_code_rows: int
    codes: str  # which rows, in words


def code_owners(config: RunConfig, layout: ParallelLayout) -> list[CodeOwner]:
    """Return the owners in rank order, for a layout that passed the check."""
    layer = LayerShape.from_config(config, layout)
    num_ranks, num_experts = layout.expert_model_parallel_size, layer.num_moe_experts
    owners = []
    for rank in range(num_ranks):
        experts = experts_of_rank(rank, num_experts, num_ranks)
        num_rows, words = 0, "no codes (path=continuous)"
        if layer.path != "continuous" and layer.code_map == "mod":
            rounds, left_over = divmod(layer.num_code_rows, num_experts)
            num_rows = rounds * len(experts)
            num_rows += min(max(left_over - experts.start, 0), len(experts))
            words = f"row mod {num_experts} in {experts.start}..{experts.stop - 1}"
        elif layer.path != "continuous":
            num_rows = layer.num_code_rows // num_ranks
            words = f"fixed from the first data ({layer.code_map})"
        owners.append(CodeOwner(rank, experts.start, experts.stop - 1, num_rows, words))
    return owners
