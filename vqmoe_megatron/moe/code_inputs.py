"""What the expert of each code row is fed: the code's own vector, or a learned one.

T tokens, C code slices, K codes, D = H / C, R rows asked for. Row ids are ``slice * K + code``.

vq.code_input = codebook: the code vector in the place of its slice, zeros elsewhere; the task never
moves the codebook. learned: a vector of full width per row, trained by the task alone.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.moe.norms import mark_sequence_parallel
from vqmoe_megatron.vq.codebook import Codebook
from vqmoe_megatron.vq.segment_sum import lookup_rows


class LearnedCodeInputs(torch.nn.Module):
    """One trained vector per row, ``[C, K, H]``, replicated on all ranks of the layer.

    Drawn from a standard normal, the scale of normalised hidden states.
    """

    def __init__(self, config: TransformerConfig, vq: VQConfig, seed: int) -> None:
        super().__init__()
        self.shape = (vq.num_code_slices, vq.num_codes, config.hidden_size)
        self.base_seed = seed
        self.vectors = torch.nn.Parameter(
            torch.empty(self.shape, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.set_layer_number(0)
        mark_sequence_parallel(self, config)

    @torch.no_grad()
    def set_layer_number(self, layer_number: int) -> None:
        """Give every layer its own start, the same at every layout."""
        generator = torch.Generator().manual_seed(self.base_seed * 1009 + layer_number)
        self.vectors.copy_(torch.randn(self.shape, generator=generator))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Row ids int64 ``[R]`` -> ``[R, H]``, differentiable. No communication."""
        return lookup_rows(self.vectors.flatten(0, 1), rows)


def code_vectors_in_place(codebook: Codebook, rows: torch.Tensor) -> torch.Tensor:
    """Row ids int64 ``[R]`` -> ``[R, H]``: each code vector in its slice. No gradient."""
    num_slices, num_codes, width = codebook.codes.shape
    vectors = codebook.code_vectors().detach().reshape(-1, width).index_select(0, rows)
    if num_slices == 1:
        return codebook.lift(vectors)
    placed = vectors.new_zeros(rows.numel(), num_slices, width)
    placed[torch.arange(rows.numel(), device=rows.device), rows // num_codes] = vectors
    return placed.flatten(1)
