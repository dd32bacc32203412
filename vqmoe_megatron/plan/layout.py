"""The parallel layout and every rule that ties it to the model, the batch and the device.

Sizes are Megatron's: TP tensor, PP pipeline, VPP virtual pipeline chunks per stage, CP context,
EP expert, ETP expert tensor, DP data, EDP expert data. Dense layers and experts cut the same
``world_size`` ranks in two ways:

    world_size = TP * CP * DP * PP = ETP * EP * EDP * PP

A broken rule is reported as its equation with the numbers filled in; all of them at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm

from vqmoe_megatron.config import ModelConfig, RunConfig

# Megatron's recompute_modules that work here: GroupedExperts has no moe_act, and Megatron's
# layernorm recompute needs Transformer Engine.
RECOMPUTE_MODULES = ("core_attn", "mlp", "moe")


@dataclass(frozen=True)
class ParallelLayout:
    """The sizes of one run, with what the recipe leaves open resolved. Holds no process group."""

    world_size: int
    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    virtual_pipeline_model_parallel_size: int | None  # None: no interleaving; never 1
    context_parallel_size: int
    expert_model_parallel_size: int
    expert_tensor_parallel_size: int
    sequence_parallel: bool  # True exactly when TP > 1, in a layout that passed the check

    @classmethod
    def from_config(cls, config: RunConfig, world_size: int) -> ParallelLayout:
        """Resolve the recipe's layout for ``world_size`` ranks, without checking it.

        ``sequence_parallel`` unset becomes TP > 1. Set, it stays off with TP = 1, where there is
        nothing to shard (Megatron ignores it there too). One virtual chunk means no interleaving.
        """
        parallel = config.parallel
        virtual = parallel.virtual_pipeline_model_parallel_size
        many_tensor_ranks = parallel.tensor_model_parallel_size > 1
        return cls(
            world_size=world_size,
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=None if virtual == 1 else virtual,
            context_parallel_size=parallel.context_parallel_size,
            expert_model_parallel_size=parallel.expert_model_parallel_size,
            expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
            sequence_parallel=many_tensor_ranks and parallel.sequence_parallel is not False,
        )

    @property
    def dense_ranks(self) -> int:
        """TP * PP * CP: the ranks that hold one copy of the dense layers."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )

    @property
    def expert_ranks(self) -> int:
        """ETP * EP * PP: the ranks that hold one copy of the experts."""
        return (
            self.expert_tensor_parallel_size
            * self.expert_model_parallel_size
            * self.pipeline_model_parallel_size
        )

    @property
    def data_parallel_size(self) -> int:
        """DP = world_size / (TP * PP * CP), in a layout that passed the check."""
        return self.world_size // self.dense_ranks

    @property
    def expert_data_parallel_size(self) -> int:
        """EDP = world_size / (ETP * EP * PP), in a layout that passed the check."""
        return self.world_size // self.expert_ranks

    def num_microbatches(self, global_batch_size: int, micro_batch_size: int) -> int:
        """Return the microbatches per step: global_batch_size / (micro_batch_size * DP)."""
        return global_batch_size // (micro_batch_size * self.data_parallel_size)


def minimum_world_size(config: RunConfig) -> int:
    """Return the fewest ranks the layout fits on: PP * lcm(TP * CP, EP * ETP)."""
    parallel = config.parallel
    return parallel.pipeline_model_parallel_size * lcm(
        parallel.tensor_model_parallel_size * parallel.context_parallel_size,
        parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size,
    )


def check_layout(config: RunConfig, world_size: int, device: str | None = None) -> ParallelLayout:
    """Return the layout, or raise one ``ValueError`` with every rule it breaks.

    ``device`` as in :func:`layout_errors`. Communicates nothing; call it before ranks start.
    """
    errors = layout_errors(config, world_size, device)
    if errors:
        title = f"the recipe cannot run on {world_size} rank{'s' if world_size != 1 else ''}"
        raise ValueError(f"{title}:\n" + "\n".join(f"  - {error}" for error in errors))
    return ParallelLayout.from_config(config, world_size)


def layout_errors(config: RunConfig, world_size: int, device: str | None = None) -> list[str]:
    """Return every broken rule as an equation with its numbers; an empty list means it can run.

    ``device`` is the resolved ``cpu`` or ``cuda``; ``None`` takes ``train.device``, of which
    ``auto`` cannot be judged here. Batch rules need DP, so they wait until the world size fits.
    """
    if world_size < 1:
        return [f"world_size={world_size} must be at least 1"]
    layout = ParallelLayout.from_config(config, world_size)
    return [
        *_world_errors(layout, minimum_world_size(config)),
        *_tensor_errors(config, layout),
        *_pipeline_errors(config.model, layout),
        *_sequence_errors(config, layout, device or config.train.device),
        *_expert_errors(config, layout),
        *_batch_errors(config, layout),
        *_recompute_errors(config.model, layout),
        *_schedule_errors(config),
    ]


def _remainder(name: str, value: int, divisor: str, size: int, advice: str) -> Iterator[str]:
    """Yield ``name % divisor != 0`` with its numbers, unless ``size`` divides ``value``."""
    if value % size:
        yield f"{name} % {divisor} != 0: {value} % {size} = {value % size}; {advice}"


def _world_errors(layout: ParallelLayout, minimum: int) -> Iterator[str]:
    advice = f"use a multiple of {minimum} ranks or change parallel.*"
    world = layout.world_size
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    cp = layout.context_parallel_size
    dense = f"(TP * PP * CP = {tp} * {pp} * {cp})"
    yield from _remainder("world_size", world, dense, layout.dense_ranks, advice)
    ep, etp = layout.expert_model_parallel_size, layout.expert_tensor_parallel_size
    expert = f"(EP * ETP * PP = {ep} * {etp} * {pp})"
    yield from _remainder("world_size", world, expert, layout.expert_ranks, advice)


def _tensor_errors(config: RunConfig, layout: ParallelLayout) -> Iterator[str]:
    model, tp = config.model, layout.tensor_model_parallel_size
    advice = "every tensor-parallel rank holds an equal share"
    groups = model.num_query_groups or model.num_attention_heads
    yield from _remainder(
        "num_attention_heads",
        model.num_attention_heads,
        "num_query_groups",
        groups,
        "every query group serves the same number of heads",
    )
    divided = {"num_attention_heads": model.num_attention_heads}
    if model.num_query_groups is not None:
        divided["num_query_groups"] = model.num_query_groups
    divided["make_vocab_size_divisible_by"] = model.make_vocab_size_divisible_by
    if model.moe_layer_freq > 1:  # some layers are dense; Megatron's default width is 4 * hidden
        divided["ffn_hidden_size"] = model.ffn_hidden_size or 4 * model.hidden_size
    for name, value in divided.items():
        yield from _remainder(name, value, "TP", tp, advice)
    if tp > 1 and config.parallel.sequence_parallel is False:
        yield (
            f"parallel.sequence_parallel=false with TP = {tp} > 1: Megatron's MoE layers train "
            "with tensor parallelism only under sequence parallelism; leave it unset or use TP = 1"
        )


def _pipeline_errors(model: ModelConfig, layout: ParallelLayout) -> Iterator[str]:
    pp = layout.pipeline_model_parallel_size
    virtual = layout.virtual_pipeline_model_parallel_size
    advice = "every pipeline stage holds as many layers as the others"
    if virtual is None:
        yield from _remainder("num_layers", model.num_layers, "PP", pp, advice)
        return
    if pp == 1:
        yield (
            f"VPP = {virtual} needs PP > 1: PP = {pp}; interleaving spreads chunks over stages, "
            "so leave virtual_pipeline_model_parallel_size unset without a pipeline"
        )
    chunks = f"(PP * VPP = {pp} * {virtual})"
    yield from _remainder("num_layers", model.num_layers, chunks, pp * virtual, advice)


def _sequence_errors(config: RunConfig, layout: ParallelLayout, device: str) -> Iterator[str]:
    length, cp = config.model.seq_length, layout.context_parallel_size
    if layout.sequence_parallel:
        tp = layout.tensor_model_parallel_size
        name, size = ("TP", tp) if cp == 1 else (f"(TP * CP = {tp} * {cp})", tp * cp)
        advice = "sequence parallelism gives every rank an equal slice"
        yield from _remainder("seq_length", length, name, size, advice)
    if cp > 1:
        reason = (
            "Megatron's context parallelism needs Transformer Engine's fused attention, which "
            "exists only for CUDA"
            if device == "cpu"
            else "this release does not cut sequences over context-parallel ranks"
        )
        yield f"context_parallel_size = {cp} > 1 on device={device}: {reason}; use 1"
    stride = config.data.eval_stride_tokens
    if stride is not None and stride > length:
        yield (
            f"data.eval_stride_tokens <= model.seq_length fails: {stride} > {length}; evaluation "
            "would skip the tokens between two windows"
        )


def _expert_errors(config: RunConfig, layout: ParallelLayout) -> Iterator[str]:
    model, etp = config.model, layout.expert_tensor_parallel_size
    yield from _remainder(
        "num_moe_experts",
        model.num_moe_experts,
        "EP",
        layout.expert_model_parallel_size,
        "every expert-parallel rank owns as many experts as the others",
    )
    yield from _remainder(
        "moe_ffn_hidden_size",
        model.moe_ffn_hidden_size,
        "ETP",
        etp,
        "every expert-tensor-parallel rank holds an equal share",
    )
    if etp > 1:
        yield (
            f"expert_tensor_parallel_size = {etp} > 1 is not in this release: the code-driven "
            "dispatcher shards experts over expert_model_parallel_size only; use 1"
        )
    if model.moe_layer_freq > model.num_layers:
        yield (
            f"moe_layer_freq <= num_layers fails: {model.moe_layer_freq} > {model.num_layers}; "
            "layer 1 and then every moe_layer_freq-th layer hold experts, so num_layers already "
            "means only the first"
        )
    try:
        config.vq.check_model(model.hidden_size, model.num_moe_experts)
    except ValueError as error:
        yield str(error)


def _batch_errors(config: RunConfig, layout: ParallelLayout) -> Iterator[str]:
    if layout.world_size % layout.dense_ranks:
        return  # DP is no whole number; _world_errors has said so
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size
    dp, pp = layout.data_parallel_size, layout.pipeline_model_parallel_size
    product = f"(micro_batch_size * DP = {micro} * {dp})"
    advice = "every data-parallel rank runs as many microbatches as the others"
    uneven = list(_remainder("global_batch_size", batch, product, micro * dp, advice))
    yield from uneven
    if layout.virtual_pipeline_model_parallel_size is not None and not uneven:
        yield from _remainder(
            "num_microbatches",
            layout.num_microbatches(batch, micro),
            "PP",
            pp,
            f"the interleaved schedule runs microbatches in groups of PP; num_microbatches = "
            f"global_batch_size / (micro_batch_size * DP) = {batch} / ({micro} * {dp})",
        )


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
        return
    if modules is not None:
        yield "recompute_modules has no effect with recompute_granularity=full; unset one"
    if method not in ("uniform", "block"):
        yield (f"recompute_granularity=full needs recompute_method uniform or block, not {method}")
    chunks = layout.pipeline_model_parallel_size * (
        layout.virtual_pipeline_model_parallel_size or 1
    )
    per_chunk = model.num_layers // chunks
    if num_layers is None or not 1 <= num_layers <= per_chunk:
        yield (
            "recompute_granularity=full needs 1 <= recompute_num_layers <= layers per pipeline "
            f"chunk: 1 <= {num_layers} <= {model.num_layers} // {chunks} = {per_chunk}"
        )
    elif method == "uniform":
        yield from _remainder(
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
