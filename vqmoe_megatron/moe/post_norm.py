"""Norms behind the residual sums of a block: y = norm(x + f(x)), as the first Transformer had them.

S sequence length, B batch, H hidden size.

Megatron's layer calls whatever stands in the place of its bias-dropout-add, so that place takes the
norm; those in front of attention and MLP are left out, and so is the one behind the last layer.
``vq.norm=shared_with_block``: the norm behind the experts is the module that norms expert inputs
and the discrete output too, as the VQMoE release has it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

SumWithResidual = Callable[
    [tuple[torch.Tensor, torch.Tensor | None], torch.Tensor, float], torch.Tensor
]


class NormedSum(torch.nn.Module):
    """In the place of Megatron's bias-dropout-add: norm(residual + dropout(x + bias)).

    Args:
        new_norm: builds the norm, by Megatron's arguments; None: it belongs to another module, and
            is lent by :meth:`borrow`.
        config: Megatron's.
    """

    def __init__(self, new_norm: type | None, config: TransformerConfig) -> None:
        super().__init__()
        if new_norm is not None:
            self.norm = new_norm(
                config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )
            self.borrow(self.norm)

    def borrow(self, norm: torch.nn.Module) -> None:
        """Use ``norm``, whose parameters stay its owner's."""
        self._apply_norm = norm.__call__  # the module itself would be registered twice

    def forward(self, training: bool, fused: bool) -> SumWithResidual:
        """The function of (x ``[S, B, H]``, bias), residual ``[S, B, H]`` and the dropout rate. No
        communication."""
        add = get_bias_dropout_add(training, fused)
        return lambda *parts: self._apply_norm(add(*parts))


class SharedNormLayer(TransformerLayer):
    """Megatron's layer whose last norm is its VQMoE layer's."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.mlp_bda.borrow(self.mlp.lend_norm())


def with_norms_behind(
    layer: ModuleSpec, config: TransformerConfig, new_norm: type, is_shared: bool
) -> ModuleSpec:
    """Change the spec of a layer of local modules, and return it.

    Args:
        layer: dense or VQMoE.
        config: Megatron's.
        new_norm: builds the norms.
        is_shared: whether the last norm is the VQMoE layer's own.
    """
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = IdentityOp

    def normed_sum(norm: type | None) -> ModuleSpec:
        return ModuleSpec(module=NormedSum, params={"new_norm": norm, "config": config})

    parts.self_attn_bda = normed_sum(new_norm)
    parts.mlp_bda = normed_sum(None if is_shared else new_norm)
    if is_shared:
        layer.module = SharedNormLayer
    return layer
