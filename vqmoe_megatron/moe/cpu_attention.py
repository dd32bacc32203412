"""Megatron's local attention on a CPU, without its scores: torch's kernel does the core of it.

Megatron's ``DotProductAttention`` writes the scores [b, A, S, S] and passes over them for the
product, the mask, the softmax and the values. Torch's ``scaled_dot_product_attention`` has a CPU
kernel that goes over them block by block, leaves out blocks behind the diagonal, and keeps for its
backward pass the output and one number per row.

Megatron's refuses sequences that are cut over context-parallel ranks. Here every rank gathers the
keys and values of whole sequences (``context_attention``).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from vqmoe_megatron.moe.context_attention import attend_to_whole_sequences


class CpuAttention(DotProductAttention):
    """A ``DotProductAttention`` whose attention on the CPU, causal or to all tokens, is torch's.

    Megatron's own forward pass remains for everything else: dropout, masks that are given, windows,
    sinks, scores scaled per layer, biases, packed sequences, keys kept from earlier tokens, values
    of another width than the keys, and tensors elsewhere. Of sequences cut over context-parallel
    ranks there is nobody to leave these to.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs: Any,
    ) -> None:
        """As Megatron's, which is not told of context parallelism."""
        uncut = copy.copy(config)
        uncut.context_parallel_size = 1
        super().__init__(uncut, *args, pg_collection=pg_collection, **kwargs)
        self.config = config
        self.cp_group = None
        if config.context_parallel_size > 1:
            self.cp_group = getattr(pg_collection, "cp", None)
            self.cp_group = self.cp_group or parallel_state.get_context_parallel_group()

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        **others: Any,
    ) -> torch.Tensor:
        """Attend, as Megatron does.

        Args:
            query: ``[S, b, A, d]``, of this tensor-parallel rank's A heads and this
                context-parallel rank's S positions.
            key: ``[S, b, G, d]``; head a reads group ``a // (A / G)``.
            value: likewise.
            attention_mask: None, for the mask of the layer's type.
            attn_mask_type: not read, as in Megatron: the type is the layer's.
            others: Megatron's ``attention_bias``, ``packed_seq_params``.

        Returns:
            ``[S, b, A d]`` in the dtype of the query. Communicates over the context-parallel group
            as :func:`attend_to_whole_sequences`.

        Raises:
            ValueError: with context parallelism, for what this attention leaves to Megatron's.
        """
        is_plain = attention_mask is None and all(other is None for other in others.values())
        is_plain = is_plain and self._is_plain() and is_square_on_cpu(query, key, value)
        is_causal = self.attn_mask_type == AttnMaskType.causal
        if self.cp_group is not None:
            if not (is_plain and is_causal):
                raise ValueError(
                    f"context_parallel_size={self.config.context_parallel_size}: outside "
                    "Transformer Engine's attention, which needs CUDA, cut sequences have plain "
                    "causal attention of fp32, fp64 or bf16 on a CPU alone: no attention dropout "
                    "in training, no mask or bias of their own, no window, sink, packed sequence "
                    "or cache of keys; use 1"
                )
            return attend_to_whole_sequences(query, key, value, self.softmax_scale, self.cp_group)
        if not is_plain:
            return super().forward(query, key, value, attention_mask, attn_mask_type, **others)
        context = torch.nn.functional.scaled_dot_product_attention(
            *(states.permute(1, 2, 0, 3) for states in (query, key, value)),
            is_causal=is_causal,
            scale=self.softmax_scale,
            enable_gqa=query.size(2) != key.size(2),
        )  # [b, A, S, d], which lies in memory as the query does
        return context.permute(2, 0, 1, 3).flatten(2).contiguous()

    def _is_plain(self) -> bool:
        """Whether the softmax of this layer is the usual one, under the causal mask or none."""
        softmax = self.scale_mask_softmax
        return (
            self.attn_mask_type in (AttnMaskType.causal, AttnMaskType.no_mask)
            and softmax.window_size is None
            and softmax.scale is None
            and self.softmax_offset is None
            and not (self.training and self.attention_dropout.p > 0)
        )


def is_square_on_cpu(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether tensors ``[S, b, A or G, d]`` on the CPU have as many queries as keys, of one width.

    Torch's causal mask begins at the first key, Megatron's ends at the last.
    """
    is_on_cpu = query.device.type == "cpu"
    return is_on_cpu and query.size(0) == key.size(0) and query.size(3) == value.size(3)
