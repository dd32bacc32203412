"""The core of Transformer-XL's attention: scores by content and by relative position.

S queries, L keys of which the last S are the queries' own, b sequences, A heads of d columns and G
groups of this tensor-parallel rank, H hidden size. Query i and key j, k_j its key and R the vector
of their distance (``relative_positions``):

    score = (q_i + u) . k_j + (q_i + v) . W R        by 1 / sqrt(d); u, v [d] and W [d, H] per head

as in "Transformer-XL" (arXiv 1901.02860), equation of section 3.3. There u and v are one pair for
all layers in the released code; here every layer has its own, since pipeline stages share nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)

from vqmoe_megatron.moe.transformer_xl.relative_positions import by_key, distance_vectors


class RelativeAttention(DotProductAttention):
    """A ``DotProductAttention`` whose keys may begin before its queries, with relative positions.

    Megatron's own sizes, scale and dropout; scores, mask and softmax are here. Parameters are cut
    over tensor-parallel ranks by heads: ``position_weight`` ``[A d, H]``, ``content_bias`` (u) and
    ``position_bias`` (v) ``[A d]``, vectors so that they do not decay, as biases.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        shapes = {
            "position_weight": (self.hidden_size_per_partition, config.hidden_size),
            "content_bias": (self.hidden_size_per_partition,),
            "position_bias": (self.hidden_size_per_partition,),
        }
        for name, shape in shapes.items():
            values = torch.empty(
                shape, dtype=config.params_dtype, device=torch.cuda.current_device()
            )
            if config.perform_initialization:
                with tensor_parallel.get_cuda_rng_tracker().fork():
                    config.init_method(values)
            parameter = torch.nn.Parameter(values)
            set_tensor_model_parallel_attributes(parameter, True, 0, 1)
            self.register_parameter(name, parameter)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        **others: Any,
    ) -> torch.Tensor:
        """Attend to every key up to the query's own.

        Args:
            query: ``[S, b, A, d]``.
            key: ``[L, b, G, d]``; head a reads group ``a // (A / G)``.
            value: likewise.
            attention_mask: None: the mask is causal.
            attn_mask_type: not read, as in Megatron.
            others: Megatron's ``attention_bias``, ``packed_seq_params``: None.

        Returns:
            ``[S, b, A d]`` in the dtype of the query. No communication.

        Raises:
            ValueError: for a mask, a bias or packed sequences.
        """
        if attention_mask is not None or any(other is not None for other in others.values()):
            raise ValueError(
                "model.attention=transformer_xl is plainly causal: it takes no attention mask, "
                "bias or packed sequences; use model.attention=standard for those"
            )
        (length, batch, heads, columns), num_keys = query.shape, key.size(0)
        if (repeats := heads // key.size(2)) > 1:
            key, value = (one.repeat_interleave(repeats, dim=2) for one in (key, value))
        by_content = (query + self.content_bias.view(heads, columns)).permute(1, 2, 0, 3)
        scores = by_content @ key.permute(1, 2, 3, 0)  # [b, A, S, L]
        vectors = distance_vectors(num_keys, self.config.hidden_size, query)
        places = torch.nn.functional.linear(vectors, self.position_weight)  # [L, A d]
        by_place = (query + self.position_bias.view(heads, columns)).permute(2, 1, 0, 3)
        by_place = by_place.reshape(heads, batch * length, columns)
        distances = torch.bmm(by_place, places.view(num_keys, heads, columns).permute(1, 2, 0))
        distances = by_key(distances.view(heads, batch, length, num_keys))
        scores = (scores + distances.transpose(0, 1)) * self.softmax_scale
        probs = self._dropped(self._softmax(scores))
        context = probs @ value.permute(1, 2, 0, 3)  # [b, A, S, d]
        return context.permute(2, 0, 1, 3).flatten(2).contiguous()

    @staticmethod
    def _softmax(scores: torch.Tensor) -> torch.Tensor:
        """Over the keys that are not behind their query, in fp32 at least."""
        length, num_keys = scores.shape[-2:]
        is_hidden = torch.ones(length, num_keys, dtype=torch.bool, device=scores.device)
        hidden = scores.masked_fill(is_hidden.triu(num_keys - length + 1), float("-inf"))
        precision = torch.promote_types(scores.dtype, torch.float32)
        return torch.softmax(hidden, dim=-1, dtype=precision).to(scores.dtype)

    def _dropped(self, probs: torch.Tensor) -> torch.Tensor:
        """As Megatron: heads of other ranks draw other masks."""
        if self.config.sequence_parallel:
            return self.attention_dropout(probs)
        with tensor_parallel.get_cuda_rng_tracker().fork():
            return self.attention_dropout(probs)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict | None = None,
    ) -> ShardedStateDict:
        """Parameters, cut over heads."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        own = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(
            own, prefix, dict.fromkeys(own, 0), sharded_offsets, tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )  # fmt: skip
