"""What another training engine than Megatron's own cannot do, and why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.config.memory_codebooks import hidden_quantizer
from vqmoe_megatron.config.router_rules import other_router

if TYPE_CHECKING:
    from vqmoe_megatron.plan.layout import ParallelLayout

OWN_DATA_PARALLELISM = "DeepSpeed reduces gradients and cuts the optimizer itself; set it to false"


def engine_errors(config: RunConfig, layout: ParallelLayout) -> list[str]:
    """Return every rule of ``train.engine`` that the recipe breaks."""
    train = config.train
    if train.engine != "deepspeed":
        return [
            f"{name} has no effect with train.engine={train.engine}; {advice}"
            for name, value, advice in (
                (
                    "train.zero_stage",
                    train.zero_stage,
                    "use train.engine=deepspeed, or Megatron's optimizer.use_distributed_optimizer",
                ),
                ("train.offload_optimizer", train.offload_optimizer, "use train.engine=deepspeed"),
            )
            if value
        ]
    return [*_layout_errors(layout), *_setting_errors(config)]


def _layout_errors(layout: ParallelLayout) -> Iterator[str]:
    sizes = {
        "TP": layout.tensor_model_parallel_size,
        "PP": layout.pipeline_model_parallel_size,
        "CP": layout.context_parallel_size,
        "ETP": layout.expert_tensor_parallel_size,
    }
    if any(size > 1 for size in sizes.values()):
        shown = " * ".join(map(str, sizes.values()))
        yield (
            f"train.engine=deepspeed needs {' * '.join(sizes)} = 1: {shown}; DeepSpeed knows "
            "nothing of Megatron's tensor, pipeline and context parallel groups and would count "
            "what they hold wrongly; spread over DP and EP, or use train.engine=megatron"
        )


def _setting_errors(config: RunConfig) -> Iterator[str]:
    train, section = config.train, config.optimizer
    for name in ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather"):
        if getattr(section, name):
            yield f"optimizer.{name} with train.engine=deepspeed: {OWN_DATA_PARALLELISM}"
    if config.vq.table_per_step:
        yield (
            "vq.table_per_step with train.engine=deepspeed: gradients are reduced before the "
            "step's table has added its part; set it to false"
        )
    if config.model.calculate_per_token_loss:
        yield (
            "model.calculate_per_token_loss with train.engine=deepspeed: gradients would have to "
            "be divided after DeepSpeed has reduced them; set it to false"
        )
    for name in ("model.gradient_accumulation_fusion", "optimizer.fused_adam"):
        key_section, _, key = name.partition(".")
        if getattr(getattr(config, key_section), key):
            yield (
                f"{name}=true with train.engine=deepspeed: DeepSpeed holds gradients and optimizer "
                "in its own buffers, and torch's fused AdamW moves them; leave it out"
            )
    if train.cuda_graphs:
        yield "train.cuda_graphs with train.engine=deepspeed was never tried; set it to false"
    if (problem := other_router(config, "train.engine=deepspeed", "use topk")) is not None:
        yield problem
    if config.model.fp8:
        yield "model.fp8 with train.engine=deepspeed was never tried; leave it out"
    if config.model.bf16 and not train.zero_stage:
        yield (
            "model.bf16 with train.zero_stage=0: without ZeRO DeepSpeed keeps gradients of bf16 "
            "weights in another form, which was never proved here; use train.zero_stage=1"
        )
    vq, memory = config.vq, config.code_memory
    if config.model.bf16 and vq.has_codes and (vq.trains_scale or vq.trains_projection):
        yield (
            "vq.learn_code_scale or vq.train_projection in bf16 with train.engine=deepspeed: "
            "DeepSpeed casts every trained parameter, of codebooks too, which must stay fp32; set "
            "both to false, or use fp32"
        )
    of_memory = memory.is_on and memory.codes == "hidden"
    if config.model.bf16 and (
        (vq.has_codes and vq.trains_codes)
        or (of_memory and hidden_quantizer(vq, memory).trains_codes)
    ):
        yield (
            f"vq.codebook_update={vq.codebook_update} in bf16 with train.engine=deepspeed: "
            "DeepSpeed casts every trained parameter, codes too, which must stay fp32; use ema or "
            "fp32"
        )
    if train.offload_optimizer and not train.zero_stage:
        yield "train.offload_optimizer needs train.zero_stage 1 or 2: ZeRO 0 offloads nothing"
