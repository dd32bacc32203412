"""Which of Megatron's settings the layer honours, and which it refuses.

A setting that asks for something the layer does not do is never passed over in silence. Three
tables: ``HONOURED`` (by this layer, its experts or Megatron's router inside it), ``REFUSED``
(anything but the listed values), and conditions of their own below. A field of a newer Megatron
that is about experts, routing or activations and stands in no table must keep its default.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.config.not_offered import FP16_REFUSED
from vqmoe_megatron.moe.step_statistics import HALVES
from vqmoe_megatron.plan.rules import (
    FP8_NEEDS_TOKENS,
    FP8_WITHOUT_FILL,
    FP8_WITHOUT_RECOMPUTE,
    ONE_EXPERT_BY_THRESHOLD,
    PRE_SOFTMAX_FOR_FILL,
)
from vqmoe_megatron.runtime.fused_parts import FP8

# What a MoE layer and its experts could be asked to do, whatever the field is called.
SUBJECT = re.compile(r"^moe_|expert|router|activation_func|glu|relu")

HONOURED = {
    # experts
    "num_moe_experts",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",  # by Megatron's own, which has no biases
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "context_parallel_size",  # statistics and candidates are of whole sequences
    "activation_func",
    "activation_func_clamp_value",
    "gated_linear_unit",
    "glu_linear_offset",
    "perform_initialization",
    "moe_grouped_gemm",  # GroupedExperts is one grouped GEMM, with SequentialMLP's checkpoint keys
    # the continuous path, whose router is Megatron's
    "moe_aux_loss_coeff",
    "moe_z_loss_coeff",
    "moe_router_load_balancing_type",
    "moe_router_topk",
    "moe_router_topk_limited_devices",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_pre_softmax",
    "moe_router_topk_scaling_factor",
    "moe_router_score_function",
    "moe_router_dtype",
    "moe_router_enable_expert_bias",
    "moe_router_bias_update_rate",
    "moe_router_fusion",
    "moe_token_drop_policy",  # of moe_expert_capacity_factor
    "moe_per_layer_logging",
    "fp8",  # by Transformer Engine's experts, see _refuse_fp8; GroupedExperts refuses it
    # around the layer
    "moe_layer_freq",  # by get_vqmoe_block_spec; elsewhere see check_layer_number
    "moe_layer_recompute",
    # of settings that are refused themselves
    "moe_flex_dispatcher_backend",
    "moe_deepep_num_sms",
    "moe_hybridep_num_sms",
}


@dataclass(frozen=True)
class Refusal:
    """The values of a setting that the layer takes, and why no other."""

    legal: tuple[Any, ...]
    reason: str


_NO_QUANTISATION = Refusal((None, False), "its experts run in fp32 or bf16")
_OWN_ROWS = Refusal((None, False), "rows travel by the layer's own plan")
_OWN_EXPERTS = Refusal((False,), "its experts are one grouped GEMM of torch's")
_NO_FP8 = Refusal(
    (None,),
    "torch's grouped GEMM has no fp8; get_vqmoe_block_spec(config, vq) takes Transformer Engine's "
    "experts",
)
_NO_OVERLAP = Refusal((False,), "its experts have no separate weight-gradient pass")

REFUSED = {
    "moe_shared_expert_gate": Refusal((False,), "the shared expert is added with weight one"),
    "moe_shared_expert_overlap": Refusal((False,), _OWN_ROWS.reason),
    "moe_latent_size": Refusal((None,), "experts see hidden vectors of the full size"),
    "moe_apply_probs_on_input": Refusal((False,), "weights are applied to expert outputs"),
    "moe_input_jitter_eps": Refusal((None,), "the codebook must see the token itself"),
    "moe_enable_routing_replay": Refusal((False,), "codes are not recorded for a replay"),
    "moe_token_dropping": _OWN_ROWS,
    "moe_pad_expert_input_to_capacity": _OWN_ROWS,
    "moe_permute_fusion": _OWN_ROWS,
    "moe_enable_deepep": _OWN_ROWS,
    "moe_token_dispatcher_type": Refusal(("alltoall", "allgather"), _OWN_ROWS.reason),
    "moe_extended_tp": Refusal((False,), "use expert_tensor_parallel_size"),
    "moe_use_legacy_grouped_gemm": _OWN_EXPERTS,
    "moe_router_padding_for_quantization": _NO_QUANTISATION,
    "moe_router_padding_for_fp8": _NO_QUANTISATION,
    "fp16": Refusal((False,), FP16_REFUSED),
    "fp4": _NO_QUANTISATION,
    "use_kitchen": _NO_QUANTISATION,
    "quant_recipe": _NO_QUANTISATION,
    "activation_func_fp8_input_store": _NO_QUANTISATION,
    "use_te_activation_func": _OWN_EXPERTS,
    "use_fused_weighted_squared_relu": _OWN_EXPERTS,
    "delay_wgrad_compute": _NO_OVERLAP,
    "overlap_moe_expert_parallel_comm": _NO_OVERLAP,
    "use_cpu_initialization": Refusal((False,), "experts are drawn on their device"),
    "init_model_with_meta_device": Refusal((False,), "codebooks are drawn at construction"),
    "batch_invariant_mode": Refusal((False,), "its kernels follow the batch"),
    "hybrid_context_parallel": Refusal((False,), "sequences must be cut over all ranks alike"),
}
# Parts of a MoE layer that Megatron can recompute or offload one by one.
REFUSED_PARTS = {
    "recompute_modules": ("moe_act", "shared_experts"),
    "offload_modules": ("expert_fc1", "moe_act"),
}
REFUSED_WITH_CODES = {
    "moe_expert_capacity_factor": Refusal((None,), "codes have no capacity"),
    "moe_router_force_load_balancing": Refusal((False,), "codes are not drawn at random"),
}
_NO_ROUTER = Refusal((None, False, 0.0), "no router weights are learned or corrected")
# The learned router's; a path=discrete has none. Balance losses and topk are left to the recipe,
# where one setting of the model serves every path.
REFUSED_WITHOUT_ROUTER = {
    "moe_router_enable_expert_bias": _NO_ROUTER,
    "moe_router_num_groups": _NO_ROUTER,
    "moe_router_group_topk": _NO_ROUTER,
    "moe_router_topk_limited_devices": _NO_ROUTER,
    "moe_router_topk_scaling_factor": _NO_ROUTER,
    "moe_router_fusion": _NO_ROUTER,
    "moe_router_score_function": Refusal(("softmax",), _NO_ROUTER.reason),
}
REFUSED_WITH_ONE_EXPERT = {
    **REFUSED_WITHOUT_ROUTER,
    "moe_expert_capacity_factor": Refusal((None,), "the one expert takes every token"),
}
_FULL_SOFTMAX = Refusal(
    (None, False), "every expert is weighed by the softmax over all of them, chosen or not"
)
# path=filled: the router's probabilities of all experts weigh exact and filled outputs alike.
REFUSED_WITH_FILL = {
    "moe_router_pre_softmax": Refusal((True,), PRE_SOFTMAX_FOR_FILL),
    "moe_router_score_function": Refusal(("softmax",), _FULL_SOFTMAX.reason),
    "moe_router_topk_scaling_factor": _FULL_SOFTMAX,
    "moe_router_enable_expert_bias": _FULL_SOFTMAX,
    "moe_router_num_groups": _FULL_SOFTMAX,
    "moe_router_group_topk": _FULL_SOFTMAX,
    "moe_router_topk_limited_devices": _FULL_SOFTMAX,
    "moe_router_fusion": Refusal((False,), "its choice is the layer's own"),
    "fp8": Refusal((None,), FP8_WITHOUT_FILL),
}
_ONE_ON_AVERAGE = Refusal((1,), ONE_EXPERT_BY_THRESHOLD)
# A bare codebook as Megatron's router.
REFUSED_BY_ROUTER = {
    **REFUSED_WITH_CODES,
    **REFUSED_WITHOUT_ROUTER,
    "moe_pad_expert_input_to_capacity": _NO_ROUTER,
    "moe_enable_routing_replay": _NO_ROUTER,
    "moe_z_loss_coeff": _NO_ROUTER,
    "moe_input_jitter_eps": _NO_ROUTER,
    "moe_router_padding_for_quantization": _NO_ROUTER,
    "moe_router_padding_for_fp8": _NO_ROUTER,
    "fp16": REFUSED["fp16"],
}
# What GroupedExperts would not do, in whatever MoE layer they are.
EXPERT_SETTINGS = (
    "moe_apply_probs_on_input",
    "moe_use_legacy_grouped_gemm",
    "moe_latent_size",
    "fp4",
    "use_kitchen",
    "activation_func_fp8_input_store",
    "use_te_activation_func",
    "use_fused_weighted_squared_relu",
    "delay_wgrad_compute",
    "use_cpu_initialization",
    "init_model_with_meta_device",
)


def check_layer_settings(config: TransformerConfig, vq: VQConfig) -> None:
    """Raise ``ValueError`` for a setting that :class:`VQMoELayer` would not honour."""
    _refuse("VQMoELayer", config, REFUSED)
    if vq.path != "continuous":
        _refuse(f"VQMoELayer with vq.path={vq.path}", config, REFUSED_WITH_CODES)
    if vq.path == "discrete":
        _refuse("VQMoELayer with vq.path=discrete", config, REFUSED_WITHOUT_ROUTER)
    elif not vq.has_router(config.num_moe_experts):
        _refuse("VQMoELayer with num_moe_experts=1", config, REFUSED_WITH_ONE_EXPERT)
    if vq.path == "filled":
        _refuse_with_fill(config, vq)
    for name, parts in REFUSED_PARTS.items():
        if asked := [part for part in getattr(config, name) or () if part in parts]:
            raise ValueError(
                f"VQMoELayer cannot do {name}={', '.join(asked)}: it is one piece; leave these out"
            )
    if config.moe_shared_expert_intermediate_size is not None and config.add_bias_linear:
        raise ValueError(
            "moe_shared_expert_intermediate_size needs add_bias_linear=False: Megatron's "
            "SharedExpertMLP has no biases"
        )
    _refuse_captured_graphs(config)
    _refuse_fp16_parameters("VQMoELayer", config)
    if config.fp8:
        _refuse_fp8(config, vq)
    if (
        config.moe_z_loss_coeff
        and config.calculate_per_token_loss
        and config.tensor_model_parallel_size * config.context_parallel_size > 1
    ):
        raise ValueError(
            "moe_z_loss_coeff with calculate_per_token_loss and tensor_model_parallel_size * "
            "context_parallel_size > 1: Megatron's router weighs the z-loss 1 / (TP * CP) there; "
            "leave one of them out"
        )
    _refuse_unknown(config)


def check_expert_settings(config: TransformerConfig) -> None:
    """Raise ``ValueError`` for a setting that :class:`GroupedExperts` would not honour."""
    _refuse("GroupedExperts", config, {name: REFUSED[name] for name in EXPERT_SETTINGS})
    _refuse("GroupedExperts", config, {"fp8": _NO_FP8})


def check_router_settings(config: TransformerConfig) -> None:
    """Raise ``ValueError`` for a setting that :class:`VQRouter` would not honour."""
    _refuse("VQRouter", config, REFUSED_BY_ROUTER)
    _refuse_fp16_parameters("VQRouter", config)
    balancing = config.moe_router_load_balancing_type
    if "sinkhorn" in balancing:
        raise ValueError("VQRouter does not do moe_router_load_balancing_type=sinkhorn; use none")
    coefficients = config.moe_aux_loss_coeff
    coefficients = coefficients if isinstance(coefficients, list) else [coefficients]
    if balancing != "none" and any(coefficients):
        raise ValueError(
            f"VQRouter has no balance loss, but moe_aux_loss_coeff={config.moe_aux_loss_coeff}; "
            "set it to 0 or moe_router_load_balancing_type to none"
        )


def check_layer_number(config: TransformerConfig, layer_number: int) -> None:
    """Raise ``ValueError`` where ``moe_layer_freq`` wants a dense layer in this place.

    ``layer_number`` is 1-based, over all pipeline stages.
    """
    if layer_number <= config.num_layers and not is_moe_layer(config, layer_number - 1):
        raise ValueError(
            f"moe_layer_freq={config.moe_layer_freq} makes layer {layer_number} dense, this spec "
            "makes it a VQMoE layer; leave moe_layer_freq at 1, or build the model with "
            "vqmoe_megatron.moe.get_vqmoe_block_spec(config, vq)"
        )


def is_moe_layer(config: TransformerConfig, index: int) -> bool:
    """Whether Megatron's ``moe_layer_freq`` (a period or a list of 0 and 1) wants experts in the
    layer of this 0-based index."""
    freq = config.moe_layer_freq
    return bool(freq[index]) if isinstance(freq, list) else index % freq == 0


def refuse_trained_codes_in_half(config: TransformerConfig, codebook: torch.nn.Module) -> None:
    """Raise ``ValueError`` for trained fp32 codes, or what else an optimizer moves of ``codebook``,
    among weights of half precision.

    In one parameter group Megatron's distributed optimizer gives fp32 and bf16 parameters each
    other's Adam states, and its plain one cannot be saved.
    """
    is_half = config.bf16 or config.fp16 or config.params_dtype in HALVES
    if is_half and any(parameter.requires_grad for parameter in codebook.parameters()):
        raise ValueError(
            "trained codes (vq.codebook_update=gradient or reanchor), their scale and projection "
            "(vq.learn_code_scale, vq.train_projection) are fp32 parameters, which Megatron's "
            "optimizers can neither hold nor save beside bf16 weights in one group; use "
            "vq.codebook_update=ema, or fp32, or give '*.codebook.*' a parameter group of its "
            "own, as vqmoe pretrain does, and set config.finalize_model_grads_func = CodebookSync()"
        )


def _refuse(who: str, config: TransformerConfig, table: dict[str, Refusal]) -> None:
    for name, refusal in table.items():
        value = getattr(config, name, refusal.legal[0])  # older Megatrons lack some
        if not any(value is legal or value == legal for legal in refusal.legal):
            legal = " or ".join(str(legal) for legal in refusal.legal)
            raise ValueError(
                f"{who} does not do {name}={value}: {refusal.reason}; leave it at {legal}"
            )


def _refuse_with_fill(config: TransformerConfig, vq: VQConfig) -> None:
    _refuse("VQMoELayer with vq.path=filled", config, REFUSED_WITH_FILL)
    if vq.threshold_routing:
        who = "VQMoELayer with vq.threshold_routing=true"
        _refuse(who, config, {"moe_router_topk": _ONE_ON_AVERAGE})
    if "sinkhorn" in config.moe_router_load_balancing_type:
        raise ValueError(
            "VQMoELayer with vq.path=filled does not do moe_router_load_balancing_type=sinkhorn, "
            "which chooses by other numbers than the softmax that weighs; use aux_loss, "
            "seq_aux_loss, global_aux_loss or none"
        )


def _refuse_captured_graphs(config: TransformerConfig) -> None:
    """The layer's rows follow the data, so only graphs of attention alone go around it."""
    captured = getattr(config, "cuda_graph_scope", None) or getattr(
        config, "cuda_graph_modules", None
    )
    captured = captured if isinstance(captured, list) else [captured]
    if config.cuda_graph_impl != "none" and any(
        getattr(part, "name", part) != "attn" for part in captured
    ):
        raise ValueError(
            f"VQMoELayer cannot be captured in CUDA graphs (cuda_graph_impl="
            f"{config.cuda_graph_impl}): its rows follow the data; capture attn alone, or use none"
        )


def _refuse_fp16_parameters(who: str, config: TransformerConfig) -> None:
    if config.params_dtype == torch.float16:
        raise ValueError(f"{who} does not do params_dtype=torch.float16: {FP16_REFUSED}")


def _refuse_fp8(config: TransformerConfig, vq: VQConfig) -> None:
    """Where Transformer Engine's experts would not be run, or not as Megatron runs them."""
    if (obstacle := FP8.obstacle()) is not None:
        raise ValueError(
            f"VQMoELayer cannot do fp8={config.fp8}: {obstacle}; it is Transformer Engine's linear "
            "layers that run in fp8; leave it at None"
        )
    if vq.in_code_space:
        raise ValueError(f"VQMoELayer with fp8={config.fp8}: {FP8_NEEDS_TOKENS}")
    if config.recompute_granularity == "selective" and "moe" in (config.recompute_modules or ()):
        raise ValueError(f"VQMoELayer with fp8={config.fp8}: {FP8_WITHOUT_RECOMPUTE}")


def _refuse_unknown(config: TransformerConfig) -> None:
    """Fields that this release has never seen must keep their defaults."""
    for field in dataclasses.fields(TransformerConfig):
        value, default = getattr(config, field.name), field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if not is_classified(field.name) and value != default:
            raise ValueError(
                f"VQMoELayer does not know Megatron's {field.name}={value}; leave it at {default}"
            )


def is_classified(name: str) -> bool:
    """Whether a field is none of the layer's business, or stands in one of the tables."""
    tables = (HONOURED, REFUSED, REFUSED_PARTS, REFUSED_WITH_CODES)
    return not SUBJECT.search(name) or any(name in table for table in tables)
