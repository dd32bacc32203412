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

from vqmoe_megatron.config import ModelConfig, RunConfig, TrainConfig
from vqmoe_megatron.config.finetune import finetune_errors
from vqmoe_megatron.config.ranges import RANKS
from vqmoe_megatron.plan.attention_rules import attention_errors
from vqmoe_megatron.plan.rules import expert_width_errors, remainder, run_errors


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

    def num_microbatches(self, train: TrainConfig) -> int:
        """Return the microbatches per step: global_batch_size / (micro_batch_size * DP)."""
        return train.global_batch_size // (train.micro_batch_size * self.data_parallel_size)


def unsharded() -> ParallelLayout:
    """Return the layout of one rank, which holds the whole model."""
    return ParallelLayout(1, 1, 1, None, 1, 1, 1, False)


def minimum_world_size(config: RunConfig) -> int:
    """Return the fewest ranks the layout fits on: PP * lcm(TP * CP, EP * ETP)."""
    parallel = config.parallel
    return parallel.pipeline_model_parallel_size * lcm(
        parallel.tensor_model_parallel_size * parallel.context_parallel_size,
        parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size,
    )


CUT_ATTENTION_ON_CUDA = (
    "Megatron attends to cut sequences by Transformer Engine's kernels alone, whose ring has never "
    "been run with this layer; keys are gathered in plain torch on a CPU only"
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
    if world_size not in RANKS:
        return [f"world_size={world_size} must be {RANKS}"]
    layout = ParallelLayout.from_config(config, world_size)
    return [
        *_world_errors(layout, minimum_world_size(config)),
        *_tensor_errors(config, layout),
        *_pipeline_errors(config.model, layout),
        *_sequence_errors(config, layout, device or config.train.device),
        *_expert_errors(config, layout),
        *_batch_errors(config, layout),
        *run_errors(config, layout),
        *finetune_errors(config),
        *attention_errors(config, layout, device or config.train.device),
    ]


def _world_errors(layout: ParallelLayout, minimum: int) -> Iterator[str]:
    advice = f"use a multiple of {minimum} ranks or change parallel.*"
    world = layout.world_size
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    cp = layout.context_parallel_size
    dense = f"(TP * PP * CP = {tp} * {pp} * {cp})"
    yield from remainder("world_size", world, dense, layout.dense_ranks, advice)
    ep, etp = layout.expert_model_parallel_size, layout.expert_tensor_parallel_size
    expert = f"(EP * ETP * PP = {ep} * {etp} * {pp})"
    yield from remainder("world_size", world, expert, layout.expert_ranks, advice)


def _tensor_errors(config: RunConfig, layout: ParallelLayout) -> Iterator[str]:
    model, tp = config.model, layout.tensor_model_parallel_size
    advice = "every tensor-parallel rank holds an equal share"
    groups = model.num_query_groups or model.num_attention_heads
    yield from remainder(
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
    if model.moe_shared_expert_intermediate_size is not None:
        divided["moe_shared_expert_intermediate_size"] = model.moe_shared_expert_intermediate_size
    for name, value in divided.items():
        yield from remainder(name, value, "TP", tp, advice)
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
        yield from remainder("num_layers", model.num_layers, "PP", pp, advice)
        return
    if pp == 1:
        yield (
            f"VPP = {virtual} needs PP > 1: PP = {pp}; interleaving spreads chunks over stages, "
            "so leave virtual_pipeline_model_parallel_size unset without a pipeline"
        )
    chunks = f"(PP * VPP = {pp} * {virtual})"
    yield from remainder("num_layers", model.num_layers, chunks, pp * virtual, advice)


def _sequence_errors(config: RunConfig, layout: ParallelLayout, device: str) -> Iterator[str]:
    length, cp = config.model.seq_length, layout.context_parallel_size
    if layout.sequence_parallel:
        tp = layout.tensor_model_parallel_size
        name, size = ("TP", tp) if cp == 1 else (f"(TP * CP = {tp} * {cp})", tp * cp)
        advice = "sequence parallelism gives every rank an equal slice"
        yield from remainder("seq_length", length, name, size, advice)
    if cp > 1:
        yield from remainder(
            "seq_length",
            length,
            f"(2 * CP = 2 * {cp})",
            2 * cp,
            "every context-parallel rank holds two chunks as long as the others'",
        )
        if config.model.attention_dropout:
            yield (
                f"attention_dropout={config.model.attention_dropout} with context_parallel_size = "
                f"{cp} > 1: the attention that gathers keys has no dropout, and Megatron's own "
                "takes whole sequences only; set it to 0"
            )
        if device == "cuda":
            yield (
                f"context_parallel_size = {cp} > 1 on device=cuda: {CUT_ATTENTION_ON_CUDA}; use 1"
            )
    window, stride = config.data.eval_window_tokens, config.data.eval_stride_tokens
    if window is not None and window > length:
        yield (
            f"data.eval_window_tokens <= model.seq_length fails: {window} > {length}; the model "
            "takes no longer ones"
        )
    name = "model.seq_length" if window is None else "data.eval_window_tokens"
    window = length if window is None else window
    if stride is not None and stride > window:
        yield (
            f"data.eval_stride_tokens <= {name} fails: {stride} > {window}; evaluation "
            "would skip the tokens between two windows"
        )


def _expert_errors(config: RunConfig, layout: ParallelLayout) -> Iterator[str]:
    model = config.model
    yield from remainder(
        "num_moe_experts",
        model.num_moe_experts,
        "EP",
        layout.expert_model_parallel_size,
        "every expert-parallel rank owns as many experts as the others",
    )
    yield from expert_width_errors(
        model.hidden_size,
        model.moe_ffn_hidden_size,
        2 if model.bf16 else 4,
        layout.expert_tensor_parallel_size,
    )
    if (
        model.calculate_per_token_loss
        and model.moe_z_loss_coeff
        and (num_parts := layout.tensor_model_parallel_size * layout.context_parallel_size) > 1
    ):
        yield (
            f"moe_z_loss_coeff={model.moe_z_loss_coeff} with calculate_per_token_loss and TP * CP "
            f"= {num_parts} > 1: Megatron 0.16.1 would weigh the z-loss 1 / (TP * CP) of what it "
            "should; leave one out"
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
    try:
        config.code_memory.check_model(
            model.num_layers,
            model.num_moe_experts,
            layout.expert_tensor_parallel_size,
            model.moe_layer_freq,
        )
    except ValueError as error:
        yield str(error)


def _batch_errors(config: RunConfig, layout: ParallelLayout) -> Iterator[str]:
    if layout.world_size % layout.dense_ranks:
        return  # DP is no whole number; _world_errors has said so
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size
    dp, pp = layout.data_parallel_size, layout.pipeline_model_parallel_size
    product = f"(micro_batch_size * DP = {micro} * {dp})"
    advice = "every data-parallel rank runs as many microbatches as the others"
    uneven = list(remainder("global_batch_size", batch, product, micro * dp, advice))
    yield from uneven
    if layout.virtual_pipeline_model_parallel_size is not None and not uneven:
        yield from remainder(
            "num_microbatches",
            layout.num_microbatches(config.train),
            "PP",
            pp,
            f"the interleaved schedule runs microbatches in groups of PP; num_microbatches = "
            f"global_batch_size / (micro_batch_size * DP) = {batch} / ({micro} * {dp})",
        )
