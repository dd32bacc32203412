"""Every parameter of a run by name: what a rank of each pipeline stage holds, in Megatron's order.

H hidden size, A attention heads, G query groups, d columns of a head, F expert, Fs shared and D
dense hidden size, c1 = 2 for gated MLPs else 1, V padded vocabulary, S sequence length, N experts,
C code slices, K codes, w columns of a code; TP, EP and ETP cut what the comments say.

The order is that of ``named_parameters`` of the real model with Megatron-core's own modules. The
distributed optimizer pads and cuts its buffers in this order, so bytes follow from it exactly.
With Transformer Engine the same elements come in another order, which moves padding only.
All ranks of a pipeline stage hold equally many elements, whatever their TP and EP place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod

from vqmoe_megatron.config import ModelConfig, RunConfig
from vqmoe_megatron.config.memory_codebooks import hidden_quantizer
from vqmoe_megatron.plan.ends import head_tensors, num_head_classes, patch_tensors
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.plan.router_cost import router_tensors
from vqmoe_megatron.plan.shape import LayerShape

PARTS = (
    *("embeddings", "patches", "attention", "norms", "dense_mlp", "router", "experts"),
    *("shared_experts", "codebooks", "learned_inputs", "fill_rows", "gates", "memory_rows"),
    "output_layer",
)

# What stands between attention and MLP, before the one or behind the other.
NORM_BEHIND_ATTENTION = {"pre": "pre_mlp_layernorm", "post": "self_attn_bda.norm"}


@dataclass(frozen=True)
class Parameter:
    """One tensor on one rank."""

    name: str  # as in the model chunk, without the prefixes of wrappers
    part: str  # one of PARTS
    shape: tuple[int, ...]  # of this rank's shard
    bytes_per_element: int
    is_expert: bool = False  # reduced over expert-data-parallel ranks, and so in other buffers
    is_trained: bool = True  # False: no gradient, the optimizer does not know it
    is_shared_embedding: bool = False  # tied over pipeline stages: in a bucket of its own

    @property
    def num_elements(self) -> int:
        """Product of the shape."""
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Of the tensor itself."""
        return self.num_elements * self.bytes_per_element


@dataclass(frozen=True)
class ChunkPlace:
    """One model chunk: a pipeline stage, or one of its interleaved parts."""

    layers: range  # 0-based numbers over the whole model
    is_first: bool  # holds the embedding
    is_last: bool  # holds the final norm and the output layer


def padded_vocab_size(model: ModelConfig) -> int:
    """V, rows of the embedding: ``vocab_size`` rounded up to ``make_vocab_size_divisible_by``.

    Raises:
        ValueError: when the vocabulary size is not known.
    """
    if model.vocab_size is None:
        raise ValueError(
            "model.vocab_size is not set: the corpus in data.path gives it, or set it, for "
            "instance model.vocab_size=32000"
        )
    multiple = model.make_vocab_size_divisible_by
    return -(-model.vocab_size // multiple) * multiple


def num_token_ids(config: RunConfig) -> int:
    """Rows of a table by token id: V; 0 of images, which have none."""
    return 0 if config.vision.is_on else padded_vocab_size(config.model)


def is_moe_layer(model: ModelConfig, number: int) -> bool:
    """Whether the 0-based layer ``number`` holds experts; the first always does."""
    return number % model.moe_layer_freq == 0


def num_moe_layers(model: ModelConfig, places: Iterable[ChunkPlace]) -> int:
    """Layers of these chunks that hold experts."""
    return sum(is_moe_layer(model, number) for place in places for number in place.layers)


def chunk_places(
    model: ModelConfig, layout: ParallelLayout, pipeline_rank: int
) -> list[ChunkPlace]:
    """Return the chunks of one pipeline stage, in the order of its virtual ranks."""
    stages = layout.pipeline_model_parallel_size
    num_chunks = layout.virtual_pipeline_model_parallel_size or 1
    per_chunk = model.num_layers // (stages * num_chunks)
    firsts = [(virtual * stages + pipeline_rank) * per_chunk for virtual in range(num_chunks)]
    return [
        ChunkPlace(
            layers=range(first, first + per_chunk),
            is_first=first == 0,
            is_last=first + per_chunk == stages * num_chunks * per_chunk,
        )
        for first in firsts
    ]


def stage_parameters(
    config: RunConfig, layout: ParallelLayout, pipeline_rank: int
) -> list[list[Parameter]]:
    """Return the parameters of each chunk of a stage, as one rank of it holds them.

    Raises:
        ValueError: when the vocabulary size is not known.
    """
    places = chunk_places(config.model, layout, pipeline_rank)
    chunks = [list(_chunk(config, layout, place)) for place in places]
    if config.finetune.is_on and config.finetune.mode == "head":
        return [
            [replace(p, is_trained=p.part == "output_layer") for p in chunk] for chunk in chunks
        ]
    return chunks


def _chunk(config: RunConfig, layout: ParallelLayout, place: ChunkPlace) -> Iterator[Parameter]:
    model, tensor_ranks = config.model, layout.tensor_model_parallel_size
    element = 2 if model.bf16 else 4
    is_tied = not model.untie_embeddings_and_output_weights
    is_tied_over_stages = is_tied and layout.pipeline_model_parallel_size > 1
    if config.vision.is_on:
        for name, part, shape in patch_tensors(config) if place.is_first else ():
            yield Parameter(name, part, shape, element)
    elif place.is_first:
        table = (padded_vocab_size(model) // tensor_ranks, model.hidden_size)  # V / TP
        name = "embedding.word_embeddings.weight"
        yield Parameter(name, "embeddings", table, element, is_shared_embedding=is_tied_over_stages)
        if model.position_embedding_type == "learned_absolute":
            shape = (model.seq_length, model.hidden_size)
            yield Parameter("embedding.position_embeddings.weight", "embeddings", shape, element)
    layer = LayerShape.from_config(config, layout)
    for index, number in enumerate(place.layers):
        prefix = f"decoder.layers.{index}."
        yield from _attention(model, tensor_ranks, element, prefix)
        is_post, is_moe = model.norm_placement == "post", is_moe_layer(model, number)
        yield from _norm(model, element, f"{prefix}{NORM_BEHIND_ATTENTION[model.norm_placement]}")
        if is_moe:
            has_memory = config.code_memory.carries(number + 1)
            yield from _moe(config, layer, element, f"{prefix}mlp.", has_memory)
        else:
            yield from _dense_mlp(model, tensor_ranks, element, f"{prefix}mlp.")
        if is_post and not (is_moe and config.vq.norm == "shared_with_block"):
            yield from _norm(model, element, f"{prefix}mlp_bda.norm")
    if place.is_last:
        if model.norm_placement == "pre":
            yield from _norm(model, element, "decoder.final_layernorm")
        if num_head_classes(config) is not None:
            for name, part, shape in head_tensors(config):
                yield Parameter(name, part, shape, element)
        elif not is_tied or is_tied_over_stages:
            table = (padded_vocab_size(model) // tensor_ranks, model.hidden_size)  # V / TP
            name = "output_layer.weight"
            yield Parameter(
                name, "output_layer", table, element, is_shared_embedding=is_tied_over_stages
            )
    memory = config.code_memory
    if place.is_first and memory.num_context_codes and memory.is_on:
        codes = (1, memory.num_context_codes, memory.context_dim)
        yield Parameter("code_stream.contexts.codes", "codebooks", codes, 4, is_trained=False)


def _norm(model: ModelConfig, element: int, name: str) -> Iterator[Parameter]:
    for tensor in ("weight", "bias")[: 2 if model.normalization == "LayerNorm" else 1]:
        yield Parameter(f"{name}.{tensor}", "norms", (model.hidden_size,), element)


def _linear(
    name: str,
    part: str,
    shape: tuple[int, ...],
    element: int,
    has_bias: bool,
    is_trained: bool = True,
) -> Iterator[Parameter]:
    """A matrix [out, in] and, after it, its bias [out]."""
    yield Parameter(f"{name}.weight", part, shape, element, is_trained=is_trained)
    if has_bias:
        yield Parameter(f"{name}.bias", part, shape[:1], element, is_trained=is_trained)


def head_sizes(model: ModelConfig) -> tuple[int, int, int]:
    """A heads, G query groups, and the columns d of a head."""
    heads = model.num_attention_heads
    return heads, model.num_query_groups or heads, model.kv_channels or model.hidden_size // heads


def _attention(
    model: ModelConfig, tensor_ranks: int, element: int, prefix: str
) -> Iterator[Parameter]:
    """proj [H, A d / TP], qkv [(A + 2 G) d / TP, H]; before them what ``transformer_xl`` adds."""
    heads, groups, columns = head_sizes(model)
    hidden, has_bias = model.hidden_size, model.add_bias_linear
    if model.norm_placement == "pre":
        yield from _norm(model, element, f"{prefix}input_layernorm")
    name, part = f"{prefix}self_attention.linear", "attention"
    if model.attention == "transformer_xl":
        core, width = f"{prefix}self_attention.core_attention", heads * columns // tensor_ranks
        yield Parameter(f"{core}.position_weight", part, (width, hidden), element)
        for bias in ("content_bias", "position_bias"):
            yield Parameter(f"{core}.{bias}", part, (width,), element)
    shape = (hidden, heads * columns // tensor_ranks)
    yield from _linear(f"{name}_proj", part, shape, element, has_bias)
    shape = ((heads + 2 * groups) * columns // tensor_ranks, hidden)
    yield from _linear(f"{name}_qkv", part, shape, element, has_bias or model.add_qkv_bias)


def dense_ffn_size(model: ModelConfig) -> int:
    """D of the layers without experts; Megatron's default is 4 H."""
    return model.ffn_hidden_size or 4 * model.hidden_size


def _dense_mlp(
    model: ModelConfig, tensor_ranks: int, element: int, prefix: str
) -> Iterator[Parameter]:
    """fc1 [c1 D / TP, H], fc2 [H, D / TP]."""
    width, hidden = dense_ffn_size(model) // tensor_ranks, model.hidden_size
    shape = ((2 if model.gated_linear_unit else 1) * width, hidden)
    for name, of_shard in (("linear_fc1", shape), ("linear_fc2", (hidden, width))):
        yield from _linear(f"{prefix}{name}", "dense_mlp", of_shard, element, model.add_bias_linear)


def _moe(
    config: RunConfig, layer: LayerShape, element: int, prefix: str, has_memory: bool
) -> Iterator[Parameter]:
    """Router (``router_cost``), experts [N / EP, ...] cut over ETP, shared expert [c1 Fs / TP, H]
    and [H, Fs / TP], codes [C, K, w] in fp32."""
    model, vq, hidden = config.model, config.vq, layer.hidden_size
    if layer.has_router:
        for own in router_tensors(layer, model.add_bias_linear, num_token_ids(config)):
            name = f"{prefix}router.{own.name}"
            is_trained = own.is_trained and not model.moe_router_freeze
            yield Parameter(name, "router", own.shape, element, is_trained=is_trained)
    experts = layer.num_experts_per_rank
    inner = layer.moe_ffn_hidden_size // layer.expert_tensor_parallel_size
    outer = layer.fc1_width // layer.expert_tensor_parallel_size
    weights = {"weight1": (experts, outer, hidden), "weight2": (experts, hidden, inner)}
    biases = {"bias1": (experts, outer), "bias2": (experts, hidden)}
    for name, tensor in (weights | (biases if model.add_bias_linear else {})).items():
        yield Parameter(f"{prefix}experts.{name}", "experts", tensor, element, is_expert=True)
    if width := layer.shared_expert_width // layer.tensor_model_parallel_size:
        fc1 = ((2 if model.gated_linear_unit else 1) * width, hidden)
        for name, tensor in (("linear_fc1", fc1), ("linear_fc2", (hidden, width))):
            name = f"{prefix}shared_experts.{name}"
            yield from _linear(name, "shared_experts", tensor, element, has_bias=False)
    if vq.has_codes:
        yield from _coded(config, layer, element, prefix)
    if has_memory:
        yield from _memory(config, layer, element, prefix)
    if outputs := layer.num_gate_outputs:
        yield from _linear(f"{prefix}gate.linear", "gates", (outputs, hidden), element, True)


def _coded(config: RunConfig, layer: LayerShape, element: int, prefix: str) -> Iterator[Parameter]:
    """Codes [C, K, w], a trained projection [w, H] and scale in fp32, learned inputs [C, K, H],
    learned rows of fill, norms."""
    model, vq, hidden = config.model, config.vq, layer.hidden_size
    codes = (vq.num_code_slices, vq.num_codes)
    name, shape = f"{prefix}assigner.codebook.", (*codes, layer.code_width)
    yield Parameter(f"{name}codes", "codebooks", shape, 4, is_trained=vq.trains_codes)
    if vq.train_projection:
        projection, is_trained = (layer.code_width, hidden), vq.trains_projection
        yield Parameter(f"{name}projection", "codebooks", projection, 4, is_trained=is_trained)
    if vq.learn_code_scale:
        yield Parameter(f"{name}scale", "codebooks", (1, 1), 4, is_trained=vq.trains_scale)
    if vq.fill_values == "direct":
        rows = (layer.num_experts_per_rank, vq.num_codes, hidden)
        name = f"{prefix}fill_rows.values"
        yield Parameter(name, "fill_rows", rows, element, is_expert=True)
    if vq.code_input == "learned":
        name = f"{prefix}code_inputs.vectors"
        yield Parameter(name, "learned_inputs", (*codes, hidden), element)
    if layer.num_norms:
        yield from _norm(model, element, f"{prefix}input_norm")
    if layer.num_norms and vq.norm == "separate":
        yield from _norm(model, element, f"{prefix}output_norm")


def _memory(config: RunConfig, layer: LayerShape, element: int, prefix: str) -> Iterator[Parameter]:
    """Rows [N / EP, A M / N / ETP, H], gate [1, H] and 1, codes of hidden states [1, K, H]."""
    memory, hidden = config.code_memory, layer.hidden_size
    rows = memory.rows_per_layer // layer.num_moe_experts // layer.expert_tensor_parallel_size
    own = (layer.num_experts_per_rank, rows, hidden)
    yield Parameter(f"{prefix}code_memory.weight", "memory_rows", own, element, is_expert=True)
    if memory.gate == "token":
        yield from _linear(f"{prefix}memory_gate.linear", "gates", (1, hidden), element, True)
    if memory.codes == "hidden":
        vq = config.vq
        name = f"{prefix}memory_assigner.codebook.codes"
        codes = (1, memory.num_codes, hidden)
        is_trained = hidden_quantizer(vq, memory).trains_codes
        yield Parameter(name, "codebooks", codes, 4, is_trained=is_trained)
