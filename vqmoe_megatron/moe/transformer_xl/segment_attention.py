"""Megatron's self-attention whose keys and values begin with those of the text before.

M tokens of memory, S of the segment, b sequences, A heads and G groups of d columns of this
tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention


class SegmentAttention(SelfAttention):
    """A ``SelfAttention`` with ``earlier``, the normed hidden states before the segment.

    Keys and values of these come of the same projection as the segment's, by the rows of its weight
    that make keys and values: a memory has no queries. Every tensor-parallel rank holds the whole
    memory, so nothing is sent for it; its part of the norm's gradient is summed over these ranks
    with that of the norm, which sequence parallelism does anyway.
    """

    # Returns [M, b, H], normed with gradient; None: there is no text before.
    earlier: Callable[[], torch.Tensor | None] | None = None

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        """Query ``[S, b, A, d]``, key and value ``[M + S, b, G, d]``.

        Communicates as Megatron's, over the tensor-parallel group; for the memory nothing.
        """
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        states = self.earlier() if self.earlier is not None else None
        if states is None:
            return query, key, value
        earlier_key, earlier_value = self._project(states)
        return query, torch.cat([earlier_key, key]), torch.cat([earlier_value, value])

    def _project(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[M, b, G, d]`` of ``[M, b, H]``."""
        groups = self.num_query_groups_per_partition
        columns = self.hidden_size_per_attention_head
        weight, bias = self.linear_qkv.weight, self.linear_qkv.bias
        # Of every group the rows are those of its queries, of its key and of its value.
        weight = weight.view(groups, -1, columns, weight.size(1))[:, -2:].flatten(0, 2)
        if bias is not None:
            bias = bias.view(groups, -1, columns)[:, -2:].flatten()
        both = torch.nn.functional.linear(states, weight, bias)
        both = both.view(*states.shape[:2], groups, 2, columns)
        return both[:, :, :, 0], both[:, :, :, 1]
