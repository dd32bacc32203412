"""How a broken rule is reported, and the rules that are not about where the ranks stand.

Recompute, schedule, optimizer and checkpoints. As in ``layout`` a broken rule is reported as its
equation with the numbers filled in, all of them at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vqmoe_megatron.config import ModelConfig, RunConfig, VQConfig
from vqmoe_megatron.config.memory_codebooks import hidden_quantizer
from vqmoe_megatron.config.quantizer_rules import frozen_errors
from vqmoe_megatron.config.router_rules import router_errors
from vqmoe_megatron.plan.engine_rules import engine_errors
from vqmoe_megatron.plan.vision_rules import vision_errors

if TYPE_CHECKING:
    from vqmoe_megatron.plan.layout import ParallelLayout

GEMM_BYTES = 16  # torch's grouped_mm refuses strides that are no multiple of it, on every device
# Megatron's recompute_modules that work here: GroupedExperts has no moe_act, and Megatron's
# layernorm recompute needs Transformer Engine.
RECOMPUTE_MODULES = ("core_attn", "mlp", "moe")
FP8_ALIGNED = (
    32  # elements: Transformer Engine's products take 16 of them, its mxfp8 blocks hold 32
)
FP8_NEEDS_TOKENS = (
    "its experts are Transformer Engine's, which were wired to token dispatch only: set "
    "vq.execution=tokens, vq.table_per_step=false"
)
FP8_WITHOUT_FILL = (
    "its experts are Transformer Engine's, which were wired to token dispatch only; use "
    "vq.path=continuous, or leave fp8 out"
)
FP8_WITHOUT_EXPERT_VALUES = (
    "its experts are Transformer Engine's, which were wired to token dispatch only; use "
    "code_memory.values=direct, or leave fp8 out"
)
PRE_SOFTMAX_FOR_FILL = (
    "every expert is weighed by the softmax over all of them, chosen or not; set it to true"
)
ONE_EXPERT_BY_THRESHOLD = (
    "its threshold is held at one exact expert per token on average; set it to 1"
)
SHARED_NORM_IS_BEHIND = (
    "the block's norm that is shared is the one behind the experts' sum, as in the release; set "
    "model.norm_placement=post, or vq.norm=shared, which shares one norm among expert inputs and "
    "the discrete output"
)
POST_IS_LOCAL = (
    "Transformer Engine's layers have their norms in front, in one kernel with the linear layer; "
    "set model.transformer_impl=local"
)
FP8_WITHOUT_RECOMPUTE = (
    "Megatron recomputes fp8 modules through Transformer Engine's checkpoint, which this layer "
    "does not call; leave moe out of recompute_modules"
)


def remainder(name: str, value: int, divisor: str, size: int, advice: str) -> Iterator[str]:
    """Yield ``name % divisor != 0`` with its numbers, unless ``size`` divides ``value``."""
    if value % size:
        yield f"{name} % {divisor} != 0: {value} % {size} = {value % size}; {advice}"


def expert_width_errors(
    hidden_size: int, moe_ffn_hidden_size: int, element_bytes: int, etp: int = 1
) -> Iterator[str]:
    """Yield what keeps experts of these widths, cut over ``etp`` ranks, from the grouped GEMM."""
    aligned = GEMM_BYTES // element_bytes
    yield from remainder(
        "hidden_size",
        hidden_size,
        str(aligned),
        aligned,
        f"the experts' grouped GEMM takes rows of a multiple of {GEMM_BYTES} bytes",
    )
    yield from remainder(
        "moe_ffn_hidden_size",
        moe_ffn_hidden_size,
        f"(ETP * {aligned} = {etp} * {aligned})",
        etp * aligned,
        "every expert-tensor-parallel rank holds an equal share, and the grouped GEMM takes shares "
        f"of a multiple of {GEMM_BYTES} bytes",
    )


def run_errors(config: RunConfig, layout: ParallelLayout) -> list[str]:
    """Return every broken rule; an empty list means none is."""
    return [
        *_recompute_errors(config.model, layout),
        *_schedule_errors(config),
        *_optimizer_errors(config),
        *(() if config.finetune.is_on else frozen_errors(config.vq)),
        *_fp8_errors(config, layout),
        *_table_errors(config),
        *_fill_errors(config),
        *_norm_errors(config),
        *router_errors(config),
        *_checkpoint_errors(config),
        *engine_errors(config, layout),
        *vision_errors(config),
    ]


def _recompute_errors(model: ModelConfig, layout: ParallelLayout) -> Iterator[str]:
    granularity, method = model.recompute_granularity, model.recompute_method
    num_layers, modules = model.recompute_num_layers, model.recompute_modules
    if granularity is None:
        for name in ("recompute_method", "recompute_num_layers", "recompute_modules"):
            if getattr(model, name) is not None:
                yield f"{name} has no effect without recompute_granularity (full or selective)"
        return
    if granularity == "selective":
        if method is not None or num_layers is not None:
            yield (
                f"recompute_granularity=selective takes recompute_modules only, not "
                f"recompute_method={method} and recompute_num_layers={num_layers}"
            )
        if unknown := sorted(set(modules or ()) - set(RECOMPUTE_MODULES)):
            yield (
                f"recompute_modules {', '.join(unknown)} not in this model; choose from "
                f"{', '.join(RECOMPUTE_MODULES)}"
            )
        if "mlp" in (modules or ()) and model.moe_layer_freq > 1 and model.add_bias_linear:
            yield (
                "recompute_modules mlp with dense layers (moe_layer_freq = "
                f"{model.moe_layer_freq} > 1) that have biases: Megatron 0.16.1 hands the bias "
                "through its checkpoint and recurses without end in the backward pass; leave mlp "
                "out, or set add_bias_linear=false"
            )
        return
    if modules is not None:
        yield "recompute_modules has no effect with recompute_granularity=full; unset one"
    if method not in ("uniform", "block"):
        yield (f"recompute_granularity=full needs recompute_method uniform or block, not {method}")
    chunks = layout.pipeline_model_parallel_size * (
        layout.virtual_pipeline_model_parallel_size or 1
    )
    per_chunk = model.num_layers // chunks
    if num_layers is None or num_layers > per_chunk:
        yield (
            "recompute_granularity=full needs 1 <= recompute_num_layers <= layers per pipeline "
            f"chunk: 1 <= {num_layers} <= {model.num_layers} // {chunks} = {per_chunk}"
        )
    elif method == "uniform":
        yield from remainder(
            "layers per pipeline chunk",
            per_chunk,
            "recompute_num_layers",
            num_layers,
            "recompute_method=uniform cuts a chunk in units of equal length",
        )


def _schedule_errors(config: RunConfig) -> Iterator[str]:
    warmup = config.optimizer.lr_warmup_iters
    decay = config.optimizer.lr_decay_iters or config.train.train_iters
    if warmup >= decay:
        yield (
            f"lr_warmup_iters < lr_decay_iters (default: train_iters) fails: {warmup} >= {decay}; "
            "the learning rate must have iterations left to decay in"
        )


def _checkpoint_errors(config: RunConfig) -> Iterator[str]:
    if config.train.nan_policy == "rollback" and not config.checkpoint.save_interval:
        yield (
            "train.nan_policy=rollback goes back to the last checkpoint, but "
            "checkpoint.save_interval=0 writes none on the way; set it to 1 or more"
        )
    if config.checkpoint.remap and config.checkpoint.load is None:
        yield "checkpoint.remap=true needs checkpoint.load, whose codes or experts it remaps"


def _optimizer_errors(config: RunConfig) -> Iterator[str]:
    vq, memory = config.vq, config.code_memory
    of_layers = vq.path != "continuous" and vq.trains_codebook
    has_hidden_codes = memory.is_on and memory.codes == "hidden"
    of_memory = has_hidden_codes and hidden_quantizer(vq, memory).trains_codes
    if (
        config.model.bf16
        and config.train.engine == "megatron"
        and (of_layers or of_memory)
        and not config.optimizer.use_distributed_optimizer
    ):
        yield (
            f"model.bf16 with {_trained_of(vq, of_memory)} needs "
            "optimizer.use_distributed_optimizer=true: codes stay fp32, and Megatron's plain "
            "mixed-precision optimizer cannot save bf16 and fp32 parameters of one group"
        )


def _trained_of(vq: VQConfig, of_memory: bool) -> str:
    """The settings by which an optimizer moves a codebook."""
    moves_codes = vq.trains_codes or of_memory
    names = [f"vq.codebook_update={vq.codebook_update}"] if moves_codes else []
    switches = {"learn_code_scale": vq.trains_scale, "train_projection": vq.trains_projection}
    return " and ".join(names + [f"vq.{name}=true" for name, trains in switches.items() if trains])


def _fp8_errors(config: RunConfig, layout: ParallelLayout) -> Iterator[str]:
    model, etp = config.model, layout.expert_tensor_parallel_size
    if model.fp8 is None:
        return
    if config.vq.in_code_space:
        yield f"model.fp8={model.fp8}: {FP8_NEEDS_TOKENS}"
    if config.vq.path == "filled":
        yield f"model.fp8={model.fp8}: {FP8_WITHOUT_FILL}"
    if config.code_memory.is_on and config.code_memory.values == "experts":
        yield f"model.fp8={model.fp8}: {FP8_WITHOUT_EXPERT_VALUES}"
    if "moe" in (model.recompute_modules or ()):
        yield f"model.fp8={model.fp8}: {FP8_WITHOUT_RECOMPUTE}"
    if model.add_bias_linear and etp > 1:
        yield (
            f"model.fp8={model.fp8} with add_bias_linear and ETP = {etp} > 1: Megatron's experts "
            "cannot cut their biases; set add_bias_linear=false or ETP = 1"
        )
    advice = f"fp8 products take widths of a multiple of {FP8_ALIGNED}"
    width, product = model.moe_ffn_hidden_size, f"(ETP * {FP8_ALIGNED} = {etp} * {FP8_ALIGNED})"
    yield from remainder("hidden_size", model.hidden_size, str(FP8_ALIGNED), FP8_ALIGNED, advice)
    yield from remainder("moe_ffn_hidden_size", width, product, etp * FP8_ALIGNED, advice)
    if (shared := model.moe_shared_expert_intermediate_size) is not None:
        tp = layout.tensor_model_parallel_size
        name, product = "moe_shared_expert_intermediate_size", f"(TP * {FP8_ALIGNED} = {tp} * "
        yield from remainder(name, shared, f"{product}{FP8_ALIGNED})", tp * FP8_ALIGNED, advice)


def _fill_errors(config: RunConfig) -> Iterator[str]:
    model = config.model
    if config.vq.path == "filled" and not model.moe_router_pre_softmax:
        yield f"vq.path=filled with moe_router_pre_softmax=false: {PRE_SOFTMAX_FOR_FILL}"
    if config.vq.threshold_routing and model.moe_router_topk != 1:
        yield (
            f"vq.threshold_routing=true with moe_router_topk={model.moe_router_topk}: "
            f"{ONE_EXPERT_BY_THRESHOLD}"
        )


def _norm_errors(config: RunConfig) -> Iterator[str]:
    model, vq = config.model, config.vq
    if vq.norm == "shared_with_block" and model.norm_placement != "post":
        yield (
            f"vq.norm=shared_with_block with model.norm_placement={model.norm_placement}: "
            f"{SHARED_NORM_IS_BEHIND}"
        )
    if vq.norm == "shared_with_block" and not vq.has_discrete_path:
        yield (
            f"vq.norm=shared_with_block with vq.path={vq.path}: there is no discrete path whose "
            "norms the block's could be; leave vq.norm at separate"
        )
    if model.norm_placement == "post" and model.transformer_impl == "transformer_engine":
        yield f"model.norm_placement=post with transformer_impl=transformer_engine: {POST_IS_LOCAL}"


def _table_errors(config: RunConfig) -> Iterator[str]:
    if config.vq.table_per_step and config.optimizer.overlap_grad_reduce:
        yield (
            "vq.table_per_step completes the experts' gradients after the last microbatch, so "
            "optimizer.overlap_grad_reduce has nothing to overlap with, and when it sends them "
            "rests on how Megatron counts; set one to false"
        )
