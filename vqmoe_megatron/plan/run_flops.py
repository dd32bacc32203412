"""Floating-point operations of a whole step: matrix products only, a multiply-add counts as 2.

t tokens of a microbatch, S sequence length, H hidden size, A heads and G groups of d columns,
D dense width, V padded vocabulary. Per layer, forward, of all tensor ranks together:

    attention   projections 2 t H (A + 2 G) d + 2 t A d H, scores and values 4 t S A d (all pairs,
                though half of them are masked)
    dense MLP   2 t H (c1 + 1) D
    MoE         ``flop_cost``: experts, search, router, gate, code rows
    head        2 t H V

A backward pass takes twice the forward pass, in the MoE layer what ``flop_cost`` says. Recompute
repeats forward passes. In code space every data-parallel replica evaluates its own code rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.plan.flop_cost import flop_cost
from vqmoe_megatron.plan.layer_shape import LayerShape
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.plan.model_parameters import (
    ChunkPlace,
    chunk_places,
    dense_ffn_size,
    head_sizes,
    is_moe_layer,
    padded_vocab_size,
)


@dataclass(frozen=True)
class Flops:
    """Operations by pass."""

    forward: int
    backward: int
    recompute: int = 0

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.forward + other.forward,
            self.backward + other.backward,
            self.recompute + other.recompute,
        )

    def times(self, number: int) -> Flops:
        """Repeated so often."""
        return Flops(self.forward * number, self.backward * number, self.recompute * number)

    @property
    def model(self) -> int:
        """Forward and backward: what training needs, without what recompute repeats."""
        return self.forward + self.backward

    @property
    def total(self) -> int:
        """What is really executed."""
        return self.model + self.recompute


@dataclass(frozen=True)
class RunFlops:
    """Of an optimizer step."""

    per_rank: tuple[Flops, ...]  # of one rank of each pipeline stage
    all_ranks: Flops
    num_tokens: int  # of the global batch
    by_part: dict[str, int]  # forward and backward of all ranks

    @property
    def per_token(self) -> float:
        """Forward and backward, all ranks, by token of the global batch."""
        return self.all_ranks.model / self.num_tokens


def run_flops(config: RunConfig, layout: ParallelLayout) -> RunFlops:
    """Count a step of the recipe at a layout that passed the check.

    Raises:
        ValueError: when the vocabulary size is not known.
    """
    train = config.train
    num_microbatches = layout.num_microbatches(train.global_batch_size, train.micro_batch_size)
    stages = layout.pipeline_model_parallel_size
    ranks_per_stage = layout.world_size // stages
    per_rank, all_ranks = [], Flops(0, 0)
    by_part: dict[str, int] = {}
    for stage in range(stages):
        of_rank = Flops(0, 0)
        for place in chunk_places(config.model, layout, stage):
            for part, of_step in _chunk_flops(config, layout, place, num_microbatches):
                of_rank += of_step
                by_part[part] = by_part.get(part, 0) + of_step.model * ranks_per_stage
        per_rank.append(of_rank)
        all_ranks += of_rank.times(ranks_per_stage)
    return RunFlops(
        per_rank=tuple(per_rank),
        all_ranks=all_ranks,
        num_tokens=train.global_batch_size * config.model.seq_length,
        by_part=by_part,
    )


def _chunk_flops(
    config: RunConfig, layout: ParallelLayout, place: ChunkPlace, num_microbatches: int
) -> list[tuple[str, Flops]]:
    """Operations of one rank in a step, by part."""
    model = config.model
    projections, scores = attention_flops(config, layout)
    dense = dense_mlp_flops(config, layout)
    moe, moe_forward_again = _moe_flops(config, layout, num_microbatches)
    found: list[tuple[str, Flops]] = []
    for index, number in enumerate(place.layers):
        is_moe = is_moe_layer(model, number)
        again = _repeated(config, index, is_moe)
        attention = projections + scores
        repeated = attention if "layer" in again else scores if "core_attn" in again else 0
        of_attention = Flops(attention, 2 * attention, repeated).times(num_microbatches)
        found.append(("attention", of_attention))
        if is_moe:
            repeated = moe_forward_again if again & {"layer", "moe"} else 0
            found.append(("moe", Flops(moe.forward, moe.backward, repeated)))
        else:
            repeated = dense if again & {"layer", "mlp"} else 0
            of_dense = Flops(dense, 2 * dense, repeated).times(num_microbatches)
            found.append(("dense_mlp", of_dense))
    if place.is_last:
        head = output_flops(config, layout)
        found.append(("output_layer", Flops(head, 2 * head).times(num_microbatches)))
    return found


def attention_flops(config: RunConfig, layout: ParallelLayout) -> tuple[int, int]:
    """Projections, and scores with values: forward, one layer, one microbatch, one rank."""
    model, train = config.model, config.train
    heads, groups, columns = head_sizes(model)
    tokens, shards = train.micro_batch_size * model.seq_length, layout.tensor_model_parallel_size
    width = (2 * heads + 2 * groups) * columns  # q, k, v and the output projection
    projections = 2 * tokens * model.hidden_size * width // shards
    return projections, 4 * tokens * model.seq_length * heads * columns // shards


def dense_mlp_flops(config: RunConfig, layout: ParallelLayout) -> int:
    """One layer without experts: forward, one microbatch, one rank."""
    model = config.model
    tokens = config.train.micro_batch_size * model.seq_length
    matrices = 3 if model.gated_linear_unit else 2
    width = dense_ffn_size(model) // layout.tensor_model_parallel_size
    return 2 * tokens * model.hidden_size * matrices * width


def output_flops(config: RunConfig, layout: ParallelLayout) -> int:
    """Logits: forward, one microbatch, one rank."""
    model = config.model
    tokens = config.train.micro_batch_size * model.seq_length
    vocab = padded_vocab_size(model) // layout.tensor_model_parallel_size
    return 2 * tokens * model.hidden_size * vocab


def _moe_flops(
    config: RunConfig, layout: ParallelLayout, num_microbatches: int
) -> tuple[Flops, int]:
    """One MoE layer in a step on one rank, and its forward passes again. A kept table is not built
    again."""
    cost = flop_cost(LayerShape.from_config(config, layout))
    step = cost.step_flops(num_microbatches)
    rows_forward = cost.code_rows_forward_flops + cost.lift_flops
    tables = 1 if cost.are_code_rows_once_per_step else num_microbatches
    forward = num_microbatches * (cost.forward_flops - rows_forward) + tables * rows_forward
    again = num_microbatches * cost.forward_flops
    if cost.are_code_rows_once_per_step:
        again -= num_microbatches * rows_forward
    return Flops(forward, step - forward), again


def _repeated(config: RunConfig, index: int, is_moe: bool) -> set[str]:
    """What recompute repeats of layer ``index`` of a chunk: ``layer``, or single modules."""
    model = config.model
    if model.recompute_granularity == "full":
        is_kept = model.recompute_method == "block" and index >= (model.recompute_num_layers or 1)
        return set() if is_kept else {"layer"}
    if model.recompute_granularity == "selective":
        modules = model.recompute_modules
        return {"core_attn"} if modules is None else set(modules)
    return set()
