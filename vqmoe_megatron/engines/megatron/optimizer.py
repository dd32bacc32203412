"""Megatron's optimizer and learning-rate schedule from the recipe."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import (
    OptimizerConfig,
    ParamGroupOverride,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from vqmoe_megatron import registry
from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.engines.megatron.fused_adam import fuse_adams
from vqmoe_megatron.engines.megatron.optimizer_state import use_torch_adam
from vqmoe_megatron.runtime.fused_parts import PLAIN, FusedParts

# Megatron tells groups apart by this factor. 1 - lr * weight_decay * 1e-30 is 1 to the last bit.
CODE_DECAY = 1e-30


def build_optimizer(
    config: RunConfig,
    model: list[torch.nn.Module],
    has_gloo_groups: bool = True,
    parts: FusedParts = PLAIN,
) -> tuple[Any, OptimizerParamScheduler]:
    """Return Megatron's optimizer and scheduler for ``model``.

    Megatron takes a fused Adam by itself wherever one imports; without ``parts.fused_adam`` torch's
    stands in its place.

    The scheduler counts samples, as Megatron does, so that a changed batch size keeps the curve.
    Builds no new process group; no communication.
    """
    settings = optimizer_settings(config)
    overrides = parameter_overrides(config, settings)
    optimizer = get_megatron_optimizer(
        settings, model, config_overrides=overrides, use_gloo_process_groups=has_gloo_groups
    )
    if not parts.fused_adam:
        use_torch_adam(optimizer)
    fuse_adams(optimizer, next(model[0].parameters()).device.type)
    _count_experts_in_the_gradient_norm(optimizer)
    return optimizer, build_scheduler(config, optimizer)


def optimizer_settings(config: RunConfig) -> OptimizerConfig:
    """The optimizer's section of the recipe as Megatron takes it."""
    section = config.optimizer
    return OptimizerConfig(
        optimizer=section.optimizer,
        lr=section.lr,
        min_lr=section.min_lr,
        weight_decay=section.weight_decay,
        adam_beta1=section.adam_beta1,
        adam_beta2=section.adam_beta2,
        adam_eps=section.adam_eps,
        clip_grad=section.clip_grad,
        bf16=config.model.bf16,
        params_dtype=torch.bfloat16 if config.model.bf16 else torch.float32,
        use_distributed_optimizer=section.use_distributed_optimizer,
        overlap_param_gather=section.overlap_param_gather,
    )


def parameter_overrides(
    config: RunConfig, settings: OptimizerConfig
) -> dict[ParamKey, ParamGroupOverride]:
    """Which parameters decay or learn otherwise than the rest, in Megatron's form."""
    overrides = get_standard_config_overrides(settings)
    # Grouped experts stack their biases; what stands for codes must not shrink without tokens.
    undecayed = (
        *("*.experts.bias1", "*.experts.bias2", "*.code_inputs.vectors"),
        "*.fill_rows.values",
    )
    overrides[ParamKey(name=undecayed)] = ParamGroupOverride(wd_mult=0.0)
    # Codes stay fp32 in bf16 training, and Megatron's distributed optimizer mixes up the states of
    # a group that holds both kinds, so codes have a group of their own.
    of_codebook = ("*.codebook.codes", "*.codebook.projection", "*.codebook.scale")
    overrides[ParamKey(name=of_codebook)] = ParamGroupOverride(wd_mult=CODE_DECAY)
    if config.code_memory.is_on:
        overrides[ParamKey(name="*.code_memory.weight")] = _of_memory_rows(config)
    return overrides


def build_scheduler(config: RunConfig, optimizer: Any) -> OptimizerParamScheduler:
    """Megatron's schedule over ``optimizer.param_groups``, which it sets at once."""
    section, batch = config.optimizer, config.train.global_batch_size
    decay_iters = section.lr_decay_iters or config.train.train_iters
    return registry.load("schedule", section.lr_decay_style)(
        optimizer,
        init_lr=0.0,
        max_lr=section.lr,
        min_lr=section.min_lr,
        lr_warmup_steps=section.lr_warmup_iters * batch,
        lr_decay_steps=decay_iters * batch,
        lr_decay_style=section.lr_decay_style,
        start_wd=section.weight_decay,
        end_wd=section.weight_decay,
        wd_incr_steps=decay_iters * batch,
        wd_incr_style="constant",
    )


def _of_memory_rows(config: RunConfig) -> ParamGroupOverride:
    """Rows of a code memory: without decay, since most are seldom read; at a rate of their own.

    By the factor a resumed run tells their group from that of the experts' biases, which have none.
    """
    section, factor = config.optimizer, config.code_memory.lr_mult
    return ParamGroupOverride(
        wd_mult=CODE_DECAY, max_lr=section.lr * factor, min_lr=section.min_lr * factor
    )


def _count_experts_in_the_gradient_norm(optimizer: Any) -> None:
    """Let every rank count the expert gradients it holds, whatever its tensor-parallel rank.

    Megatron leaves out parameters that repeat over TP ranks on all but the first, and judges
    experts by the dense TP group as well. Experts repeat over the expert TP group only: ranks would
    leave out their own experts, clip by another norm than their replicas and drift apart. No
    communication.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if any(group.get("is_expert_parallel") for group in part.param_groups):
            part.tp_group = parallel_state.get_expert_tensor_parallel_group()
