"""The same tokens at every layout, dealt to ranks as Megatron's loader does.

A step has four microbatches of [S = 6, B = 2]. They are dealt to the data-parallel ranks in turn,
as Megatron's loader does, and under TP = 2 every rank holds half of the sequence. So every layout
sees the same tokens, and the first microbatch of the first data-parallel rank is always microbatch
0.

    1 rank    microbatches 0 1 2 3
    4 ranks   0 | 1 | 2 | 3                          (DP 4, with or without EP 2 or ETP 2)
    TP2 DP2   0 2 on ranks 0 1 | 1 3 on ranks 2 3    (sequence halves)
"""

from __future__ import annotations

import torch
from tiny_layer import HIDDEN

NUM_MICROBATCHES, SEQUENCE, BATCH = 4, 6, 2
LAYOUTS = {
    "dp4": {},
    "dp2ep2": {"expert_model_parallel_size": 2},
    "tp2ep2": {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
    "dp4etp2": {"expert_tensor_parallel_size": 2},
    "tp2ep2etp2": {
        "tensor_model_parallel_size": 2,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 2,
    },
}


def microbatches(num_steps: int) -> torch.Tensor:
    """fp32 [steps, microbatches, S, B, H], with a drift that keeps codes dying."""
    generator = torch.Generator().manual_seed(21)
    shape = (num_steps, NUM_MICROBATCHES, SEQUENCE, BATCH, HIDDEN)
    drift = torch.arange(num_steps).view(-1, 1, 1, 1, 1)
    return torch.randn(shape, generator=generator) + 0.5 * drift


def own_microbatches(step: torch.Tensor) -> list[torch.Tensor]:
    """In a rank: its microbatches [S / TP, B, H] out of a step's [M, S, B, H]."""
    from megatron.core import parallel_state

    size = parallel_state.get_data_parallel_world_size()
    own = step[parallel_state.get_data_parallel_rank() :: size]
    tensor_size = parallel_state.get_tensor_model_parallel_world_size()
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    return [m.chunk(tensor_size)[tensor_rank].contiguous() for m in own]
