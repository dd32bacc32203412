"""The two VQ losses (van den Oord et al. 2017, arXiv 1711.00937, eq. 3).

T tokens, C code slices, K codes per slice, D slice width, H = C * D. Both losses are means over all
T * H elements, as in the VQMoE release, and have the same value: the commitment loss moves tokens
towards their codes, the codebook loss moves codes towards their tokens.

On CUDA Triton kernels take the value and the tokens' gradient without an array of differences
(losses_triton.py).
"""

from __future__ import annotations

import torch

from vqmoe_megatron.vq.kernel_choice import use_kernel
from vqmoe_megatron.vq.segment_sum import segment_sum


class _QuantizationError(torch.autograd.Function):
    """Keeps the tokens and their ids only; the differences are taken again in the backward pass."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, vectors: torch.Tensor, ids: torch.Tensor):  # noqa: ANN001, ANN205
        ctx.save_for_backward(x, vectors, ids)
        if use_kernel(x, vectors, ids):
            from vqmoe_megatron.vq.losses_triton import squared_error_triton

            value = squared_error_triton(x, vectors, ids) / max(x.numel(), 1)
            return value, value.clone()
        error = _difference(x, vectors, ids).flatten()
        value = torch.dot(error, error) / max(error.numel(), 1)
        return value, value.clone()

    @staticmethod
    def backward(ctx, at_commitment: torch.Tensor, at_codebook: torch.Tensor):  # noqa: ANN001, ANN205
        x, vectors, ids = ctx.saved_tensors
        dx = dv = None
        factor = 2.0 / max(x.numel(), 1)
        of_tokens, of_codes = ctx.needs_input_grad[:2]
        if of_tokens and use_kernel(x, vectors, ids):
            from vqmoe_megatron.vq.losses_triton import error_gradient_triton

            dx = error_gradient_triton(x, vectors, ids, factor, at_commitment)
            of_tokens = False
        if not (of_tokens or of_codes):
            return dx, dv, None
        error = _difference(x, vectors, ids)
        if of_codes:
            parts = error.unflatten(1, (vectors.shape[0], -1)).unbind(1)
            sums = [segment_sum(part, ids[:, c], vectors.shape[1]) for c, part in enumerate(parts)]
            dv = torch.stack(sums) if len(sums) > 1 else sums[0].unsqueeze(0)
            dv.mul_(-factor * at_codebook)
        if of_tokens:
            dx = error.mul_(factor * at_commitment)
        return dx, dv, None


def _difference(x: torch.Tensor, vectors: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """x - v, [T, H], in fp32 (fp64 for fp64)."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    quantized = look_up_codes(vectors.to(dtype), ids)
    return torch.sub(x, quantized, out=quantized) if x.dtype == dtype else x.to(dtype) - quantized


def look_up_codes(vectors: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Code vectors ``[C, K, D]`` and ids int64 ``[T, C]`` -> ``[T, H]``; differentiable."""
    parts = [vectors[c].index_select(0, ids[:, c]) for c in range(vectors.shape[0])]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def quantization_losses(
    x: torch.Tensor, vectors: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the commitment loss mean |x - sg(v)|^2 and the codebook loss mean |sg(x) - v|^2.

    Args:
        x: ``[T, H]`` tokens in the codebook's space; the commitment loss reaches them alone.
        vectors: ``[C, K, D]`` code vectors; the codebook loss reaches them alone.
        ids: int64 ``[T, C]``, each token's codes.

    Returns:
        Two fp32 (fp64 for fp64) scalars of equal value. No communication.
    """
    return _QuantizationError.apply(x, vectors, ids)
