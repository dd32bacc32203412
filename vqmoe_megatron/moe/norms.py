"""Norm and gate modules whose parameters Megatron reduces correctly under sequence parallelism."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


def mark_sequence_parallel(module: torch.nn.Module, config: TransformerConfig) -> None:
    """Mark a TP-replicated module that sees sequence shards.

    Megatron then sums its gradients over the tensor-parallel group in ``finalize_model_grads``.
    """
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel


class _InputGradient:
    """Gradients back through a norm at looked-up rows."""

    def input_gradient(
        self, rows: torch.Tensor, ids: torch.Tensor, grads: torch.Tensor
    ) -> torch.Tensor:
        """Bring gradients back through the norm where input ``t`` was ``rows[ids[t]]``.

        Args:
            rows: ``[R, H]``.
            ids: int64 ``[T]``.
            grads: ``[T, H]`` of the outputs.

        Returns:
            ``[T, H]`` of the inputs; nothing is added to the norm's own gradients. No
            communication.
        """
        with torch.enable_grad():
            inputs = rows.detach().to(grads.dtype).index_select(0, ids).requires_grad_()
            weights = {name: parameter.detach() for name, parameter in self.named_parameters()}
            weights = {name: value.to(grads.dtype) for name, value in weights.items()}
            outputs = torch.func.functional_call(self, weights, (inputs,))
        return torch.autograd.grad(outputs, inputs, grads)[0]


class NoNorm(torch.nn.Identity):
    """The place of a norm that is not there."""

    def input_gradient(
        self, rows: torch.Tensor, ids: torch.Tensor, grads: torch.Tensor
    ) -> torch.Tensor:
        """Return the gradients ``[T, H]``."""
        return grads


class LayerNorm(_InputGradient, torch.nn.LayerNorm):
    """In the dtype of its input: fp32 rows of a table meet bf16 weights."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``[..., H]`` -> ``[..., H]``, same dtype. No communication."""
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
        return torch.nn.functional.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(_InputGradient, torch.nn.RMSNorm):
    """Likewise."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., H]`` -> ``[..., H]``, same dtype. No communication."""
        weight = self.weight.to(x.dtype)
        return torch.nn.functional.rms_norm(x, self.normalized_shape, weight, self.eps)


class ParallelNorm:
    """Build torch's LayerNorm or RMSNorm for any layout; it works in the dtype of its input.

    Megatron's ``WrappedTorchNorm`` builds the same modules but refuses sequence parallelism.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object):  # noqa: ANN204
        """Return the module; ``config.normalization`` is LayerNorm or RMSNorm."""
        kinds = {"LayerNorm": LayerNorm, "RMSNorm": RMSNorm}
        if config.normalization not in kinds:
            raise ValueError(
                f"normalization={config.normalization!r}: choose one of {', '.join(kinds)}"
            )
        # A model drawn on the CPU is refused by the layer itself, which gives the reason.
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        norm = kinds[config.normalization](
            hidden_size, eps=eps, dtype=config.params_dtype, device=device
        )
        mark_sequence_parallel(norm, config)
        return norm
