"""What one microbatch keeps of its forward pass on one rank, layer by layer: an estimate.

b micro batch, S sequence length, T local tokens (b S / TP), t = b S, H hidden size, A heads and G
query groups of d columns, D dense, F expert and Fs shared width, c1 F the width of fc1, V padded
vocabulary, e bytes per element, R rows that travel, k selected experts, C codes per token, s slots
of code space on each of P expert-parallel ranks, E expert-tensor ranks.

    attention   norm input and output, context, residual, its norm: about 5 T H e; q, k, v; local
                kernels also keep the scores [b, A, S, S], the others a number per row
    dense MLP   fc1 output and activation: 2 t D e, gated 5 t D e
    MoE         rows in experts and the code table (:func:`saved_bytes`), rows that came back, both
                paths' outputs, router scores in fp32, ids; a shared expert as a dense MLP
    memory      of a code memory: ``memory_activations``
    head        final norm, softmax of the logits in fp32 [t, V / TP]

``kernels``: ``local`` is Megatron's own modules, ``cpu`` those with torch's attention
(``moe/cpu_attention.py``), ``fused`` Transformer Engine's flash attention and norms. The sums of a
CPU are compared with tensors really saved (tests/plan/test_activation_memory.py: within 3 percent),
of attention with dropout, too, which is Megatron's own there; the fused ones were never measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from vqmoe_megatron.config import ModelConfig, RunConfig
from vqmoe_megatron.plan import memory_activations
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.plan.logits import logits_shape
from vqmoe_megatron.plan.memory_shape import MemoryShape, carries_memory, num_memory_layers
from vqmoe_megatron.plan.parameters import (
    ChunkPlace,
    dense_ffn_size,
    head_sizes,
    is_moe_layer,
)
from vqmoe_megatron.plan.shape import LayerShape
from vqmoe_megatron.plan.state_memory import NUM_THRESHOLD_SUMS
from vqmoe_megatron.plan.transformer_xl import (
    RelativeShape,
    is_relative,
    kept_bytes,
    score_bytes,
)

KERNELS = ("local", "cpu", "fused")
ID_BYTES = 8  # of codes, experts and places: int64
SOFTMAX_BYTES = 4  # attention_softmax_in_fp32, and the loss in fp32
RANDOM_STATE_BYTES = 4 * 5056  # what one recomputed call keeps to replay dropout


@dataclass(frozen=True)
class SavedBytes:
    """What the two executions of one VQMoE layer do not share: rows in experts, the table of code
    outputs and the codes that read it; of one microbatch on one rank."""

    dispatched_rows_bytes: int  # in the experts
    code_rows_bytes: int  # in the experts, code space
    table_bytes: int  # [P S, H] code outputs in fp32 (fp64), code space
    code_ids_bytes: int  # [T, C], code space
    transient_bytes: int  # made anew within the backward pass, code space

    @property
    def saved_bytes(self) -> int:
        """Kept between the passes."""
        return (
            self.dispatched_rows_bytes
            + self.code_rows_bytes
            + self.table_bytes
            + self.code_ids_bytes
        )

    @property
    def peak_bytes(self) -> int:
        """Kept between the passes, and made anew within the backward pass."""
        return self.saved_bytes + self.transient_bytes


def saved_bytes(layer: LayerShape) -> SavedBytes:
    """Return the saved activations of the layer on one rank; experts are equally loaded.

    An expert saves of every row its input [H], fc1's output [c1 F] and fc2's input [F]; a shard has
    the rows of E ranks and 1 / E of the width. Of rows that stay the input is the layer's, which is
    there anyway. Transient are the rows of ``straight_through``, at
    fc1's output: of tokens or of codes.
    """
    b, shards = layer.bytes_per_element, layer.expert_tensor_parallel_size
    inner = (layer.fc1_width + layer.moe_ffn_hidden_size) // shards
    row_bytes = b * (layer.hidden_size + inner)
    table_rows = layer.expert_model_parallel_size * layer.num_slots
    table_bytes = table_rows * layer.hidden_size * layer.sum_bytes_per_element
    # Learned rows that nobody else holds a part of, and nobody casts, are read where they are.
    num_owners = layer.expert_model_parallel_size * shards
    is_weight = layer.vq.fill_values == "direct" and num_owners == 1 and b >= 4
    has_table = layer.vq.in_code_space or layer.vq.has_fill_table
    # gradients of tokens, of weights and of each block's table
    block = layer.hidden_size * (2 if layer.has_table_gradient else 1) + layer.num_moe_experts
    fill_blocks = layer.num_fill_block_rows * block * layer.sum_bytes_per_element
    return SavedBytes(
        dispatched_rows_bytes=shards * layer.num_dispatched_rows * row_bytes
        - b * layer.num_staying_rows * layer.hidden_size,
        code_rows_bytes=layer.num_evaluated_slots * row_bytes * layer.has_table_gradient,
        table_bytes=0 if is_weight else table_bytes,
        code_ids_bytes=ID_BYTES * layer.num_searched_rows if has_table else 0,
        transient_bytes=layer.num_gradient_rows_to_tokens * layer.fc1_width * b + fill_blocks,
    )


@dataclass(frozen=True)
class ActivationBytes:
    """Kept by one microbatch on one rank."""

    layer_input: int  # [T, H], all that a fully recomputed unit of layers keeps
    attention: int  # with the layer's two norms; core_scores included
    core_scores: int  # the part that recompute_modules=core_attn drops
    dense_mlp: int
    moe: int
    embedding: int  # of the first stage
    head: int  # of the last stage
    code_tables: int  # of one layer and contained in moe: code rows and table of code outputs
    memory: int = 0  # of a layer that carries code memory
    memory_plan: int = 0  # of a chunk, which rows its tokens read

    def layer(self, is_moe: bool, has_memory: bool = False) -> int:
        """One transformer layer, nothing recomputed."""
        return self.attention + self.mlp(is_moe, has_memory)

    def mlp(self, is_moe: bool, has_memory: bool = False) -> int:
        """What stands in the place of its MLP."""
        return (self.moe if is_moe else self.dense_mlp) + (self.memory if has_memory else 0)


def activation_bytes(config: RunConfig, layout: ParallelLayout, kernels: str) -> ActivationBytes:
    """Return what one microbatch keeps, by part.

    Raises:
        ValueError: for unknown kernels, or an unknown vocabulary size.
    """
    if kernels not in KERNELS:
        raise ValueError(f"kernels={kernels!r}: choose one of {', '.join(KERNELS)}")
    model = config.model
    layer = LayerShape.from_config(config, layout)
    element = layer.bytes_per_element
    hidden_bytes = layer.num_local_tokens * model.hidden_size * element
    dropout_bytes = 0
    if model.hidden_dropout > 0:
        dropout_bytes = hidden_bytes // element if kernels == "fused" else hidden_bytes
    code_tables = 0
    if layer.vq.in_code_space or layer.vq.has_fill_table:
        kept = saved_bytes(layer)
        code_tables = kept.code_rows_bytes + kept.table_bytes
    scores = _scores(config, layout, kernels)
    projections = _projections(config, layout, layer, kernels)
    norm = _norm(config, layer, kernels)
    answers, columns = logits_shape(config, layout)
    logits = answers * columns * SOFTMAX_BYTES + answers * (ID_BYTES + 1)
    memory = None
    if config.code_memory.is_on:
        memory = MemoryShape.from_config(config, layout)
    return ActivationBytes(
        layer_input=hidden_bytes,
        attention=2 * norm + 2 * dropout_bytes + scores + projections,
        core_scores=scores,
        dense_mlp=_dense_mlp(config, layout, element),
        moe=_moe(config, layer),
        embedding=dropout_bytes,
        head=logits + (norm if config.model.norm_placement == "pre" else 0),
        code_tables=code_tables,
        memory=memory_activations.layer_bytes(memory) if memory else 0,
        memory_plan=memory_activations.chunk_bytes(memory) if memory else 0,
    )


def chunk_activation_bytes(config: RunConfig, place: ChunkPlace, kept: ActivationBytes) -> int:
    """Return what a chunk keeps of one microbatch between its passes, recompute considered."""
    model = config.model
    layers = _layers(config, place, kept)
    ends = (kept.embedding if place.is_first else 0) + (kept.head if place.is_last else 0)
    ends += kept.memory_plan
    if model.recompute_granularity == "full":
        unit = model.recompute_num_layers or 1
        of_unit = kept.layer_input + RANDOM_STATE_BYTES
        if model.recompute_method == "block":  # the first layers of each chunk, one by one
            return ends + unit * of_unit + sum(layers[unit:])
        return ends + -(-len(layers) // unit) * of_unit
    if model.recompute_granularity == "selective":
        for index, number in enumerate(place.layers):
            dropped = recomputed_parts(config, kept, carries_memory(config, number))
            names = {"core_attn", "moe" if is_moe_layer(model, number) else "mlp"}
            of_layer = [dropped[name] for name in names if name in dropped]
            layers[index] -= sum(of_layer) - len(of_layer) * RANDOM_STATE_BYTES
    return ends + sum(layers)


def _layers(config: RunConfig, place: ChunkPlace, kept: ActivationBytes) -> list[int]:
    return [
        kept.layer(is_moe_layer(config.model, number), carries_memory(config, number))
        for number in place.layers
    ]


def recomputed_parts(
    config: RunConfig, kept: ActivationBytes, has_memory: bool = False
) -> dict[str, int]:
    """Bytes of one layer that selective recompute drops, by module."""
    modules = config.model.recompute_modules
    parts = {
        "core_attn": kept.core_scores,
        "mlp": kept.dense_mlp,
        "moe": kept.mlp(True, has_memory),
    }
    chosen = ["core_attn"] if modules is None else modules  # Megatron's default
    return {name: parts[name] for name in chosen if name in parts}


def recompute_peak_bytes(config: RunConfig, place: ChunkPlace, kept: ActivationBytes) -> int:
    """What the backward pass makes anew at one time: a unit of layers, or the largest module."""
    model = config.model
    if model.recompute_granularity == "full":
        unit = model.recompute_num_layers or 1
        layers = _layers(config, place, kept)
        if model.recompute_method == "block":
            return max(layers[:unit], default=0)
        return max(sum(layers[i : i + unit]) for i in range(0, len(layers), unit))
    if model.recompute_granularity == "selective":
        has_memory = num_memory_layers(config, [place]) > 0
        return max(recomputed_parts(config, kept, has_memory).values(), default=0)
    return 0


def _norm(config: RunConfig, layer: LayerShape, kernels: str) -> int:
    """Input and output of one norm and its statistics. torch's RMSNorm keeps its input and the
    normalised rows in fp32."""
    elements = layer.num_local_tokens * layer.hidden_size
    element, tokens = layer.bytes_per_element, layer.num_local_tokens
    if config.model.normalization == "RMSNorm" and kernels != "fused":
        return elements * (2 * 4 + element) + tokens * 4
    return 2 * elements * element + 2 * tokens * element


def _heads_bytes(config: RunConfig, layout: ParallelLayout, num_heads: int) -> int:
    """[t, num_heads d / TP] in the model's dtype."""
    tokens = config.train.micro_batch_size * config.model.seq_length
    element = 2 if config.model.bf16 else 4
    columns = head_sizes(config.model)[2]
    return tokens * num_heads * columns * element // layout.tensor_model_parallel_size


def _projections(config: RunConfig, layout: ParallelLayout, layer: LayerShape, kernels: str) -> int:
    """q, k, v and the context; the residual is the next norm's input. Without query groups v lies
    in the output of the projection, and so do q and k without rope. With them q is a copy, and
    Megatron's own attention repeats k and v for every head; fused kernels are counted like it."""
    model = config.model
    if is_relative(model):
        norm = _norm(config, layer, kernels) * layout.tensor_model_parallel_size
        return kept_bytes(RelativeShape.from_config(config, layout), norm)
    heads, groups, columns = head_sizes(model)
    is_rope = model.position_embedding_type == "rope"
    context = _heads_bytes(config, layout, heads)
    angles = 4 * model.seq_length * columns * layer.bytes_per_element if is_rope else 0
    if groups != heads and (kernels == "fused" or writes_scores(model, kernels)):
        return context + 3 * _heads_bytes(config, layout, heads) + angles
    mixed = _heads_bytes(config, layout, heads + 2 * groups)
    turned = _heads_bytes(config, layout, heads) if is_rope or groups != heads else 0
    turned += _heads_bytes(config, layout, groups) if is_rope else 0
    return context + mixed + turned + angles


def writes_scores(model: ModelConfig, kernels: str) -> bool:
    """Whether attention writes its scores: Megatron's own, to which a CPU leaves dropout."""
    is_own = kernels == "local" or is_relative(model)
    return is_own or (kernels == "cpu" and model.attention_dropout > 0)


def _scores(config: RunConfig, layout: ParallelLayout, kernels: str) -> int:
    model, batch = config.model, config.train.micro_batch_size
    if is_relative(model):
        return score_bytes(config, RelativeShape.from_config(config, layout))
    heads = model.num_attention_heads // layout.tensor_model_parallel_size
    rows = batch * heads * model.seq_length
    if not writes_scores(model, kernels):
        return rows * SOFTMAX_BYTES  # log of the sum of each row
    element = 2 if model.bf16 else 4
    per_score = SOFTMAX_BYTES + (element if model.bf16 else 0)
    if model.attention_dropout > 0:
        per_score += 2 * element  # mask and result
    return rows * model.seq_length * per_score + model.seq_length**2  # and the causal mask


def _dense_mlp(config: RunConfig, layout: ParallelLayout, element: int) -> int:
    model = config.model
    width = dense_ffn_size(model) // layout.tensor_model_parallel_size
    tokens = config.train.micro_batch_size * model.seq_length
    return (5 if model.gated_linear_unit else 2) * tokens * width * element


def _moe(config: RunConfig, layer: LayerShape) -> int:
    """Everything behind the layer's norm; the input itself is that norm's output."""
    tokens, hidden, element = layer.num_local_tokens, layer.hidden_size, layer.bytes_per_element
    rows = layer.num_travelling_rows
    kept = saved_bytes(layer)
    total = kept.saved_bytes
    in_code_space = layer.vq.in_code_space
    slots = layer.num_slots
    if config.model.gated_linear_unit:  # the activated half, beside fc1's output and the product
        inner = layer.moe_ffn_hidden_size * element
        total += (layer.num_dispatched_rows + slots // layer.expert_tensor_parallel_size) * inner
    # Rows without a router's weights are not kept when they come back; of a dense layer nobody but
    # a shared expert then keeps the input.
    is_weighed = layer.has_router and layer.moe_router != "hash"  # whose weight is always one
    unweighed = 0 if is_weighed else layer.num_continuous_rows - layer.num_staying_rows
    if layer.vq.path == "continuous" and not layer.shared_expert_width:
        total -= unweighed * hidden * element
    if rows:
        is_beside = layer.vq.path == "dual"
        if layer.vq.path == "filled" and not layer.vq.builds_table_alone:
            # One tensor holds both; where nothing is exchanged or cast it is the table, too.
            num_owners = layer.expert_model_parallel_size * layer.expert_tensor_parallel_size
            is_beside = num_owners == 1 and element < layer.sum_bytes_per_element
        came_back = rows + (slots if is_beside else 0)
        total += (came_back - unweighed) * hidden * element
        total += 4 * ID_BYTES * (rows + layer.num_evaluated_slots)  # order, places
    width = layer.shared_expert_width  # TP ranks' tokens, 1 / TP of its columns
    total += (5 if config.model.gated_linear_unit else 2) * tokens * width * element
    if layer.has_router:
        total += is_weighed * 3 * tokens * layer.num_moe_experts * 4  # router scores, fp32
        total += tokens * layer.moe_router_topk * (2 * ID_BYTES + 2 * 4)
    if not layer.vq.has_codes:
        return total
    if layer.vq.path != "filled":
        total += tokens * layer.vq.num_code_slices * (2 * ID_BYTES) + tokens * ID_BYTES
    if layer.vq.code_dim is not None:
        total += tokens * layer.vq.code_dim * 4  # projected tokens
    if layer.vq.quantizer == "residual":
        total += tokens * layer.vq.num_code_slices * hidden * 4  # residuals, of the losses
    if layer.vq.path == "dual":
        total += tokens * hidden * element  # the continuous output
        total += tokens * (layer.moe_router_topk + layer.vq.num_code_slices) * ID_BYTES
    if layer.vq.path == "filled":  # the scores are counted: p, who answers, and p of those
        return total + (NUM_THRESHOLD_SUMS * 4 if layer.vq.threshold_routing else 0)
    num_norms = layer.num_norms
    if in_code_space and layer.vq.num_code_slices > 1:  # summed before the output norm
        total += tokens * (hidden * element + 5 * layer.vq.num_code_slices * ID_BYTES)
    if in_code_space:
        return total + num_norms * slots * hidden * layer.sum_bytes_per_element
    if num_norms and layer.has_code_inputs:
        total += layer.num_discrete_rows * hidden * element  # before the norm
    if layer.vq.path == "dual":
        total += tokens * hidden * element  # the discrete output
        if num_norms and layer.vq.expert_input.startswith("blend"):
            total += tokens * hidden * element  # before the norm; alone it stands for the tokens
    return total + (tokens * hidden * element if num_norms else 0)
