"""Every parameter of a run by name: what a rank of each pipeline stage holds, in Megatron's order.

H hidden size, A attention heads, G query groups, d columns of a head, F expert, Fs shared and D
dense hidden size, c1 = 2 for gated MLPs else 1, V padded vocabulary, S sequence length, N experts,
C code slices, K codes, w columns of a code; TP, EP and ETP cut what the comments say.

The order is that of ``named_parameters`` of the real model with Megatron-core's own modules. The
distributed optimizer pads and cuts its buffers in this order, so bytes follow from it exactly.
With Transformer Engine the same elements come in another order, which moves padding only.
All ranks of a pipeline stage hold equally many elements, whatever their TP and EP place.

Counted by part: in total, used by one token, and on a rank. A token uses its row of the word
embedding (and of learned positions); attention, norms, dense MLPs, shared expert, router, gates and
the output layer whole; the codebook whole, because every code is compared; of the experts those
that its rows meet, k continuous and C discrete ones (as many experts as rows, also when two meet
the same, but at most all); and its C learned inputs. In code space an expert runs once per code and
not once per token: its weights count for the token all the same, because the token's output comes
from them:

    path=continuous   k experts, router                    (a plain sparse mixture of experts)
    path=discrete     C experts, codebook                  (no router)
    path=dual         k + C experts, router, codebook, gate
    one expert        path=continuous is dense, all of it used; no path has a router
    path=filled       max(k, n) experts, n those that answer by code, router, codebook; with learned
                      rows k experts and n rows

Of a code memory a token uses A of the A M rows of a layer; with ``code_memory.values=experts`` also
the A experts that those are brought to; its gate and the codes of hidden states whole.

Tied embeddings count once, and whole, because the output layer uses all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

from vqmoe_megatron.config import ModelConfig, RunConfig
from vqmoe_megatron.plan.layout import ParallelLayout, unsharded
from vqmoe_megatron.plan.shape import LayerShape
from vqmoe_megatron.plan.vision_tensors import head_tensors, patch_tensors

PARTS = (
    *("embeddings", "patches", "attention", "norms", "dense_mlp", "router", "experts"),
    *("shared_experts", "codebooks", "learned_inputs", "fill_rows", "gates", "memory_rows"),
    "output_layer",
)


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
    return [list(_chunk(config, layout, place)) for place in places]


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
        yield from _norm(model, element, f"{prefix}pre_mlp_layernorm")
        if is_moe_layer(model, number):
            has_memory = config.code_memory.carries(number + 1)
            yield from _moe(config, layer, element, f"{prefix}mlp.", has_memory)
        else:
            yield from _dense_mlp(model, tensor_ranks, element, f"{prefix}mlp.")
    if place.is_last:
        yield from _norm(model, element, "decoder.final_layernorm")
        if config.vision.is_on:
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
    name: str, part: str, shape: tuple[int, ...], element: int, has_bias: bool
) -> Iterator[Parameter]:
    """A matrix [out, in] and, after it, its bias [out]."""
    yield Parameter(f"{name}.weight", part, shape, element)
    if has_bias:
        yield Parameter(f"{name}.bias", part, shape[:1], element)


def head_sizes(model: ModelConfig) -> tuple[int, int, int]:
    """A heads, G query groups, and the columns d of a head."""
    heads = model.num_attention_heads
    return heads, model.num_query_groups or heads, model.kv_channels or model.hidden_size // heads


def _attention(
    model: ModelConfig, tensor_ranks: int, element: int, prefix: str
) -> Iterator[Parameter]:
    """proj [H, A d / TP], qkv [(A + 2 G) d / TP, H]."""
    heads, groups, columns = head_sizes(model)
    hidden, has_bias = model.hidden_size, model.add_bias_linear
    yield from _norm(model, element, f"{prefix}input_layernorm")
    name, part = f"{prefix}self_attention.linear", "attention"
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
    """Router [N, H], experts [N / EP, ...] cut over ETP, shared expert [c1 Fs / TP, H] and [H, Fs /
    TP], codes [C, K, w] in fp32."""
    model, vq, hidden = config.model, config.vq, layer.hidden_size
    if layer.has_router:
        shape = (layer.num_moe_experts, hidden)
        yield from _linear(f"{prefix}router", "router", shape, element, model.add_bias_linear)
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
    """Codes [C, K, w] in fp32, learned inputs [C, K, H], learned rows of fill, norms."""
    model, vq, hidden = config.model, config.vq, layer.hidden_size
    codes = (vq.num_code_slices, vq.num_codes)
    is_trained = vq.codebook_update in ("gradient", "reanchor") and not vq.freeze_codebook
    name = f"{prefix}assigner.codebook.codes"
    yield Parameter(name, "codebooks", (*codes, layer.code_width), 4, is_trained=is_trained)
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
        is_trained = vq.codebook_update in ("gradient", "reanchor") and not vq.freeze_codebook
        name = f"{prefix}memory_assigner.codebook.codes"
        codes = (1, memory.num_codes, hidden)
        yield Parameter(name, "codebooks", codes, 4, is_trained=is_trained)


@dataclass(frozen=True)
class ParameterCount:
    """Elements by part, and by rank of every pipeline stage."""

    total_by_part: dict[str, int]  # replicas once, a tied table once
    active_by_part: dict[str, int]  # used by one token
    per_rank_by_part: tuple[dict[str, int], ...]  # of each stage; equal for all its TP, EP places

    @property
    def total(self) -> int:
        """Of the model."""
        return sum(self.total_by_part.values())

    @property
    def active(self) -> int:
        """Used by one token."""
        return sum(self.active_by_part.values())

    @property
    def per_rank(self) -> tuple[int, ...]:
        """On one rank of each pipeline stage."""
        return tuple(sum(parts.values()) for parts in self.per_rank_by_part)


def count_parameters(config: RunConfig, layout: ParallelLayout) -> ParameterCount:
    """Count the model of a recipe at a layout that passed the check.

    Raises:
        ValueError: when the vocabulary size is not known.
    """
    total = _by_part(config, unsharded(), 0)
    stages = range(layout.pipeline_model_parallel_size)
    return ParameterCount(
        total_by_part=total,
        active_by_part=_active(config, total),
        per_rank_by_part=tuple(_by_part(config, layout, stage) for stage in stages),
    )


def _active(config: RunConfig, total: dict[str, int]) -> dict[str, int]:
    model, vq = config.model, config.vq
    active = dict(total)
    if config.vision.is_on:  # one position of S
        active["patches"] -= (model.seq_length - 1) * model.hidden_size
    elif model.untie_embeddings_and_output_weights:
        num_tables = 2 if model.position_embedding_type == "learned_absolute" else 1
        active["embeddings"] = num_tables * model.hidden_size
    elif model.position_embedding_type == "learned_absolute":
        active["embeddings"] -= (model.seq_length - 1) * model.hidden_size
    num_rows = 0 if vq.path == "discrete" else model.moe_router_topk
    num_rows += vq.num_code_slices if vq.has_discrete_path else 0
    if vq.has_fill_table:
        num_answers = vq.num_fill_experts or model.num_moe_experts
        if "fill_rows" in active:  # one of K
            active["fill_rows"] //= model.num_moe_experts * vq.num_codes
            active["fill_rows"] *= num_answers
        else:
            num_rows = max(num_rows, num_answers)
    active["experts"] = _active_experts(config, total["experts"], num_rows)
    if "learned_inputs" in active:  # one of K per slice
        active["learned_inputs"] //= vq.num_codes
    if "memory_rows" in active:  # one of M per address
        active["memory_rows"] //= config.code_memory.num_rows
    return active


def _active_experts(config: RunConfig, total: int, num_rows: int) -> int:
    """Elements of the experts that ``num_rows`` rows meet in every layer, and with them the learned
    inputs of a memory."""
    model, memory = config.model, config.code_memory
    numbers = [n for n in range(model.num_layers) if is_moe_layer(model, n)]
    of_one = total // len(numbers) // model.num_moe_experts
    num_experts = 0
    for number in numbers:
        reads = memory.values == "experts" and memory.carries(number + 1)
        of_layer = num_rows + (memory.num_addresses if reads else 0)
        num_experts += min(of_layer, model.num_moe_experts)
    return of_one * num_experts


def _by_part(config: RunConfig, layout: ParallelLayout, stage: int) -> dict[str, int]:
    found = [p for chunk in stage_parameters(config, layout, stage) for p in chunk]
    counts = {part: sum(p.num_elements for p in found if p.part == part) for part in PARTS}
    return {part: count for part, count in counts.items() if count}
