"""What the expert of each code row is fed: the code's own vector, or a learned one.

T tokens, C code slices, K codes, D = H / C, R rows asked for. Row ids are ``slice * K + code``.

vq.code_input = codebook: the code vector in the place of its slice, zeros elsewhere, or for codes
that are added (residual) over the full width; the task never moves the codebook. learned: a vector
of full width per row, trained by the task alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.moe.norms import mark_sequence_parallel
from vqmoe_megatron.vq.codebook import Codebook
from vqmoe_megatron.vq.segment_sum import lookup_rows


class CodebookInputs:
    """The codes' own vectors: the task never moves them."""

    def __init__(self, codebook: Codebook) -> None:
        self.codebook = codebook
        self.is_sliced = codebook.is_sliced  # row c of a token stands in the place of slice c

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """None: the codebook moves in its own way."""
        return iter(())

    def set_layer_number(self, layer_number: int) -> None:
        """Nothing is drawn here."""

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Row ids int64 ``[R]`` -> ``[R, H]``, without gradient. No communication."""
        return code_vectors_in_place(self.codebook, rows)

    def of_tokens(
        self, codes: torch.Tensor, rows: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """Codes and row ids int64 ``[T, C]`` -> ``[T, C, H]``, without gradient."""
        if not self.is_sliced:
            vectors = self.codebook.code_vectors().detach().flatten(0, 1)
            return self.codebook.lift(vectors[rows]).to(dtype)
        quantized = self.codebook.lift(self.codebook.lookup(codes))
        return slices_in_place(quantized.detach().to(dtype), codes.shape[1])

    def own_gradient(self, dx: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Gradients ``[R', H]`` of expert inputs of row ids ``[R']`` -> ``[R', D]`` of their slice
        in the codebook's space."""
        num_slices, num_codes, _ = self.codebook.codes.shape
        if num_slices > 1 and self.is_sliced:
            dx = dx.unflatten(1, (num_slices, -1))  # no row may have arrived
            dx = dx[torch.arange(dx.shape[0], device=dx.device), rows // num_codes]
        return self.codebook.lower(dx)

    def token_gradient(self, dx: torch.Tensor) -> torch.Tensor:
        """``[T, C, D]`` of :meth:`own_gradient` -> ``[T, H]`` of the tokens in its space."""
        return dx.flatten(1) if self.is_sliced else dx.sum(dim=1)


class LearnedCodeInputs(torch.nn.Module):
    """One trained vector per row, ``[C, K, H]``, replicated on all ranks of the layer.

    Drawn from a standard normal, the scale of normalised hidden states. Gradients that go on to
    the tokens are brought into the space of ``codebook``, which is another module's.
    """

    is_sliced = False

    def __init__(
        self, config: TransformerConfig, vq: VQConfig, codebook: Codebook, seed: int
    ) -> None:
        super().__init__()
        self._lower = codebook.lower
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

    def of_tokens(
        self, codes: torch.Tensor, rows: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """Codes and row ids int64 ``[T, C]`` -> ``[T, C, H]``, differentiable."""
        return self(rows.reshape(-1)).view(*rows.shape, -1)

    def own_gradient(self, dx: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Gradients ``[R', H]`` of expert inputs, as they are."""
        return dx

    def token_gradient(self, dx: torch.Tensor) -> torch.Tensor:
        """``[T, C, H]`` of the rows -> ``[T, H]`` of the tokens in the codebook's space."""
        return self._lower(dx.sum(dim=1))


ExpertCodeInputs = CodebookInputs | LearnedCodeInputs


def slices_in_place(vectors: torch.Tensor, num_slices: int) -> torch.Tensor:
    """Code vectors ``[T, H]`` -> ``[T, C, H]``: row c holds slice c in its place, else zeros."""
    if num_slices == 1:
        return vectors.unsqueeze(1)
    num_tokens = vectors.shape[0]
    slices = vectors.view(num_tokens, 1, num_slices, -1)
    own_place = torch.eye(num_slices, dtype=vectors.dtype, device=vectors.device)
    return (own_place[None, :, :, None] * slices).view(num_tokens, num_slices, -1)


def code_vectors_in_place(codebook: Codebook, rows: torch.Tensor) -> torch.Tensor:
    """Row ids int64 ``[R]`` -> ``[R, H]``: each code vector in its slice, where there are slices.
    No gradient."""
    num_slices, num_codes, width = codebook.codes.shape
    vectors = codebook.code_vectors().detach().reshape(-1, width).index_select(0, rows)
    if num_slices == 1 or not codebook.is_sliced:
        return codebook.lift(vectors)
    placed = vectors.new_zeros(rows.numel(), num_slices, width)
    placed[torch.arange(rows.numel(), device=rows.device), rows // num_codes] = vectors
    return placed.flatten(1)
