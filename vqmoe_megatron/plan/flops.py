"""Floating-point operations of a whole step: matrix products only, a multiply-add counts as 2.

t tokens of a microbatch, S sequence length, H hidden size, A heads and G groups of d columns,
D dense width, V padded vocabulary. Per layer, forward, of all tensor ranks together:

    attention   projections 2 t H (A + 2 G) d + 2 t A d H, scores and values 4 t S A d (all pairs,
                though half of them are masked); of transformer_xl ``plan/transformer_xl``
    dense MLP   2 t H (c1 + 1) D
    MoE         :func:`layer_flops`: experts, shared expert, search, router, gate, code rows
    head        2 t H V
    images      2 t H C P P for the projection of patches, whose input needs no gradient, so that
                its backward pass takes as much again; 2 b H N for the head over N classes of b
                images, which every tensor rank multiplies whole
    memory      :func:`memory_flops`: rows that experts make, search of hidden states, gate; nothing
                for rows that are learned: a token adds A of them, and adds are not counted
    code stream search of contexts on every chunk, and on the first stage until codes are frozen the
                search of the vocabulary, 2 V K H, once per step: :func:`stream_flops`

A backward pass takes twice the forward pass, in the MoE layer what ``layer_flops`` says; that of
attention without scores makes them anew, which is not counted. Recompute
repeats forward passes. In code space every data-parallel replica evaluates its own code rows.

The MoE layer on one rank: T local tokens, F expert and Fs shared width, N experts, K codes per
slice, D columns of a low_dim code, S code rows of the rank that owns most, E expert-tensor ranks,
c1 F the width of fc1, m = c1 + 1 matrices per expert.

    one row through an expert  forward              2 m H F
                               weight gradients     2 m H F
                               input gradients      2 m H F, of which fc2 takes 2 H F

A row whose input needs no gradient still needs that of fc2's input, to form fc1's weight gradient:
it saves only fc1's part. Experts are equally loaded; E shards see the rows of E ranks and do 1 / E
of each. A shared expert sees every token: TP ranks see those of TP ranks and do 1 / TP of each. The
one row per code is the same for all ranks of the expert-tensor group. low_dim multiplies by its
fixed projection [D, H], which has no gradient of its own: tokens on their way to the search and
their gradients, 2 D H each way, and the rows of :func:`_lift_flops` and :func:`_num_lowered_rows`.
The experts are this package's grouped ones: Megatron's own repeat their forward pass to bring
gradients to tokens in code space.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vqmoe_megatron.config import ModelConfig, RunConfig
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.plan.logits import logits_shape
from vqmoe_megatron.plan.memory_shape import MemoryShape, carries_memory
from vqmoe_megatron.plan.parameters import (
    ChunkPlace,
    chunk_places,
    dense_ffn_size,
    head_sizes,
    is_moe_layer,
    padded_vocab_size,
)
from vqmoe_megatron.plan.router_cost import router_forward_flops
from vqmoe_megatron.plan.shape import LayerShape
from vqmoe_megatron.plan.transformer_xl import RelativeShape, is_relative

ROW_PER_CODE_PARTS = ("code_rows", "lift")  # done once per step where one table serves all of it


@dataclass(frozen=True)
class Flops:
    """Operations by pass."""

    forward: int = 0
    backward: int = 0
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
    stages = layout.pipeline_model_parallel_size
    ranks_per_stage = layout.world_size // stages
    per_rank, all_ranks = [], Flops()
    by_part: dict[str, int] = {}
    for stage in range(stages):
        of_rank = Flops()
        for place in chunk_places(config.model, layout, stage):
            for part, of_step in _chunk_flops(config, layout, place):
                of_step = _of_what_trains(config, part, of_step)
                of_rank += of_step
                by_part[part] = by_part.get(part, 0) + of_step.model * ranks_per_stage
        per_rank.append(of_rank)
        all_ranks += of_rank.times(ranks_per_stage)
    return RunFlops(
        per_rank=tuple(per_rank),
        all_ranks=all_ranks,
        num_tokens=config.train.global_batch_size * config.model.seq_length,
        by_part=by_part,
    )


def _of_what_trains(config: RunConfig, part: str, flops: Flops) -> Flops:
    """A head that trains alone has a gradient of its weights, and nothing before it has one."""
    if not config.finetune.is_on or config.finetune.mode != "head":
        return flops
    return Flops(flops.forward, flops.forward if part == "output_layer" else 0)


@dataclass(frozen=True)
class ModuleFlops:
    """Forward operations of the plain parts of one microbatch on one rank."""

    attention: int  # of a layer, ``core_attention`` included
    core_attention: int  # scores and values
    distances: int  # contained in both: of transformer_xl, whose input has no gradient
    dense_mlp: int  # of a layer
    output_layer: int
    patches: int  # the projection of images, 0 of text


def module_flops(config: RunConfig, layout: ParallelLayout) -> ModuleFlops:
    """Count them; a backward pass takes twice as many.

    Raises:
        ValueError: when the vocabulary size is not known.
    """
    model, shards = config.model, layout.tensor_model_parallel_size
    tokens = config.train.micro_batch_size * model.seq_length
    heads, groups, columns = head_sizes(model)
    width = (2 * heads + 2 * groups) * columns  # q, k, v and the output projection
    scores = 4 * tokens * model.seq_length * heads * columns // shards
    matrices = 3 if model.gated_linear_unit else 2
    answers, columns_of_head = logits_shape(config, layout)
    patch_width = config.vision.patch_width if config.vision.is_on else 0
    of_memory = distances = 0
    if is_relative(model):
        shape = RelativeShape.from_config(config, layout)
        of_memory, distances = shape.memory_flops, shape.distance_flops
        scores = shape.score_flops + distances
    return ModuleFlops(
        attention=2 * tokens * model.hidden_size * width // shards + of_memory + scores,
        core_attention=scores,
        distances=distances,
        dense_mlp=2 * tokens * model.hidden_size * matrices * (dense_ffn_size(model) // shards),
        output_layer=2 * answers * model.hidden_size * columns_of_head,
        patches=2 * (tokens // shards) * model.hidden_size * patch_width,
    )


def _chunk_flops(
    config: RunConfig, layout: ParallelLayout, place: ChunkPlace
) -> Iterator[tuple[str, Flops]]:
    """Operations of one rank in a step, by part."""
    model, layer = config.model, LayerShape.from_config(config, layout)
    plain, moe = module_flops(config, layout), step_flops(layer)

    def of_step(forward: int, repeated: int = 0) -> Flops:
        return Flops(forward, 2 * forward, repeated).times(layer.num_microbatches)

    memory = MemoryShape.from_config(config, layout) if config.code_memory.is_on else None
    of_memory = memory_flops(memory) if memory else Flops()
    if memory:
        yield "code_stream", stream_flops(memory, padded_vocab_size(model), place)
    if place.is_first and plain.patches:
        yield "patches", Flops(plain.patches, plain.patches).times(layer.num_microbatches)
    for index, number in enumerate(place.layers):
        again = repeated_modules(model, index)
        repeated = plain.core_attention if "core_attn" in again else 0
        attention = of_step(plain.attention, plain.attention if "layer" in again else repeated)
        half = Flops(backward=-plain.distances).times(layer.num_microbatches)
        yield "attention", attention + half
        if is_moe_layer(model, number):
            is_repeated = again & {"layer", "moe"}
            yield "moe", Flops(moe.forward, moe.backward, moe.recompute if is_repeated else 0)
            if carries_memory(config, number):
                once_more = of_memory.forward if is_repeated else 0
                yield "code_memory", Flops(of_memory.forward, of_memory.backward, once_more)
        else:
            is_repeated = again & {"layer", "mlp"}
            yield "dense_mlp", of_step(plain.dense_mlp, plain.dense_mlp if is_repeated else 0)
    if place.is_last:
        yield "output_layer", of_step(plain.output_layer)


def repeated_modules(model: ModelConfig, index: int) -> set[str]:
    """What recompute repeats of layer ``index`` of a chunk: ``layer``, or single modules."""
    if model.recompute_granularity == "full":
        is_kept = model.recompute_method == "block" and index >= (model.recompute_num_layers or 1)
        return set() if is_kept else {"layer"}
    if model.recompute_granularity == "selective":
        modules = model.recompute_modules
        return {"core_attn"} if modules is None else set(modules)
    return set()


def step_flops(layer: LayerShape) -> Flops:
    """One MoE layer in a step on one rank; ``recompute`` is what repeating its forward passes
    takes. A kept table is not built again."""
    each, row_per_code = Flops(), Flops()
    for part, flops in layer_flops(layer).items():
        if part in ROW_PER_CODE_PARTS and layer.vq.table_per_step:
            row_per_code += flops
        else:
            each += flops
    step = each.times(layer.num_microbatches)
    return step + row_per_code + Flops(recompute=step.forward)


def layer_flops(layer: LayerShape) -> dict[str, Flops]:
    """Return the operations of a microbatch that evaluates the code rows, by what they are for, on
    one rank with equally loaded experts. The search has no gradient."""
    shards = layer.expert_tensor_parallel_size
    rows, code_rows = layer.num_dispatched_rows, layer.num_evaluated_slots
    forward = expert_forward_flops(layer)
    dispatched_backward = _backward_flops(layer, layer.dispatched_rows_need_gradient)
    code_rows_backward = code_rows * _backward_flops(layer, layer.code_rows_need_gradient)
    code_rows_backward *= layer.has_table_gradient
    fill = 2 * layer.num_fill_block_rows * layer.num_moe_experts * layer.hidden_size
    per_logit = 2 * layer.num_local_tokens * layer.hidden_size
    router = router_forward_flops(layer)
    shared = layer.num_local_tokens * shared_expert_forward_flops(layer)
    gate = per_logit * layer.num_gate_outputs
    return {
        "dispatched": Flops(rows * forward, rows * dispatched_backward),  # rows that travel
        "code_rows": Flops(code_rows * forward // shards, code_rows_backward // shards),
        # code space: gradients back to the tokens
        "straight_through": Flops(backward=_straight_through_flops(layer)),
        # nearest code, with the projection of low_dim before it
        "search": Flops(search_flops(layer)),
        "lift": Flops(_lift_flops(layer)),
        # low_dim: gradients into the codes' space, and to the tokens
        "projection": Flops(backward=_projection_backward_flops(layer)),
        "shared_expert": Flops(shared, 2 * shared),
        # every token's sum over the rows of its code
        "fill": Flops(fill, fill * (2 if layer.has_table_gradient else 1)),
        "router": Flops(router, 2 * router),
        "gate": Flops(gate, 2 * gate),
    }


def memory_flops(shape: MemoryShape) -> Flops:
    """A layer's code memory in a step on one rank."""
    layer, memory = shape.layer, shape.memory
    gate = 2 * layer.num_local_tokens * layer.hidden_size if memory.gate == "token" else 0
    search = search_flops(shape.hidden_layer) if memory.codes == "hidden" else 0
    each = made_row_flops(shape) + Flops(gate + search, 2 * gate)
    return each.times(layer.num_microbatches)


def made_row_flops(shape: MemoryShape) -> Flops:
    """values=experts: every row of the rank goes through its expert once per microbatch, and so
    does its gradient."""
    if shape.memory.values != "experts":
        return Flops()
    forward = expert_forward_flops(shape.layer)
    backward = _backward_flops(shape.layer, needs_input_gradient=True)
    return Flops(forward, backward).times(shape.rows_per_rank)


def stream_flops(shape: MemoryShape, vocab_size: int, place: ChunkPlace) -> Flops:
    """Codes of tokens in a step on one rank of a chunk."""
    of_step = vocabulary_flops(shape, vocab_size) if place.is_first else 0
    return Flops(context_flops(shape) * shape.layer.num_microbatches + of_step)


def context_flops(shape: MemoryShape) -> int:
    """2 t Kc d: contexts of all tokens of a microbatch against their codes."""
    return 2 * shape.num_tokens * shape.memory.num_context_codes * shape.memory.context_dim


def vocabulary_flops(shape: MemoryShape, vocab_size: int) -> int:
    """2 V (K + d) H / TP: once per step a rank's entries against their codes, and the projection in
    which contexts are compared; 0 where codes stay."""
    memory = shape.memory
    if not shape.moves:
        return 0
    width = memory.num_codes if shape.groups_entries else 0
    width += memory.context_dim if memory.num_context_codes else 0
    entries = vocab_size // shape.layer.tensor_model_parallel_size
    return 2 * entries * shape.layer.hidden_size * width


def expert_forward_flops(layer: LayerShape) -> int:
    """2 m H F: one row through one whole expert."""
    return 2 * layer.hidden_size * (layer.fc1_width + layer.moe_ffn_hidden_size)


def shared_expert_forward_flops(layer: LayerShape) -> int:
    """2 m H Fs: one row through the whole shared expert."""
    matrices = 3 if layer.gated_linear_unit else 2
    return 2 * matrices * layer.hidden_size * layer.shared_expert_width


def search_flops(layer: LayerShape) -> int:
    """2 T H K: every slice of every token against that slice's K codes; residual: C times that.
    low_dim: 2 T D K, and 2 T D H for the tokens' projection. fsq and lfq round: the projection
    alone."""
    if not layer.vq.has_codes:
        return 0
    searched = 2 * layer.num_searched_rows * layer.code_width * layer.vq.num_codes
    searched *= not layer.vq.has_implicit_codes
    return searched + layer.num_local_tokens * projection_flops(layer)


def _lift_flops(layer: LayerShape) -> int:
    """low_dim: 2 D H for every code that is brought to H columns, per code in code space, where
    all E shards do the same, else per token. A learned input has H already."""
    if layer.vq.code_input == "learned":
        return 0
    return num_lifted_rows(layer) * projection_flops(layer)


def num_lifted_rows(layer: LayerShape) -> int:
    """Codes that are brought to H columns; for fill the K codes, once for all experts of a rank."""
    if layer.vq.path == "filled":
        return layer.vq.num_codes if layer.num_evaluated_slots else 0
    return layer.num_slots if layer.vq.in_code_space else layer.num_discrete_rows


def projection_flops(layer: LayerShape) -> int:
    """2 D H: one row through the projection of low_dim, either way."""
    return 0 if layer.vq.code_dim is None else 2 * layer.vq.code_dim * layer.hidden_size


def _projection_backward_flops(layer: LayerShape) -> int:
    """Gradients of expert inputs or outputs into the codes' space, and from there, together with
    the commitment loss's, to every token."""
    if not layer.vq.has_codes:
        return 0
    num_rows = layer.num_local_tokens * (2 if layer.vq.trains_projection else 1)
    num_rows += _num_lowered_rows(layer)
    return num_rows * projection_flops(layer)


def _num_lowered_rows(layer: LayerShape) -> int:
    """Gradient rows that are brought into the space of low_dim: those of tokens, or where code
    space does it at the owner of a code, before they travel back, the rows on each of E shards."""
    if not layer.has_code_inputs or layer.vq.straight_through == "none":
        return 0
    is_at_owner = layer.vq.in_code_space and layer.vq.code_input == "codebook"
    if is_at_owner and layer.vq.straight_through in ("token", "group"):
        return layer.expert_tensor_parallel_size * layer.num_gradient_rows_to_tokens
    return layer.num_local_tokens


def _backward_flops(layer: LayerShape, needs_input_gradient: bool) -> int:
    """One row back through one whole expert."""
    fc1_input_gradient = 2 * layer.hidden_size * layer.fc1_width
    both = 2 * expert_forward_flops(layer)
    return both if needs_input_gradient else both - fc1_input_gradient


def _straight_through_flops(layer: LayerShape) -> int:
    """Input gradients at the activations of the S code rows, whose fc1 runs once more."""
    num_rows = layer.num_gradient_rows_to_tokens
    if not num_rows:
        return 0
    again = 2 * layer.hidden_size * layer.fc1_width * layer.num_slots
    return num_rows * expert_forward_flops(layer) + again // layer.expert_tensor_parallel_size
