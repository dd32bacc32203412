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


class ParallelNorm:
    """Build torch's LayerNorm or RMSNorm for any layout.

    Megatron's ``WrappedTorchNorm`` builds the same modules but refuses sequence parallelism.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object):  # noqa: ANN204
        """Return the module; ``config.normalization`` is LayerNorm or RMSNorm."""
        kinds = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}
        if config.normalization not in kinds:
            raise ValueError(
                f"normalization={config.normalization!r}: choose one of {', '.join(kinds)}"
            )
        norm = kinds[config.normalization](
            hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device()
        )
        mark_sequence_parallel(norm, config)
        return norm
