"""What a rank makes between two steps: candidates, the codebooks' moves, and what a save gathers.

C code slices, K codes per slice, D slice width, M candidates, u = 4 C K D bytes. Activations are
gone by then. The temporaries are those of ``vq/codebook_update.py``, one layer at a time; every
Adam is fused and makes none.

    ema         moved sums, their quotient, codes; with revival also the replacements, and sums and
                codes with them: 6 u (3 u without revival)
    gradient    replacements and codes: 2 u (nothing without revival)
    reanchor    similarities, draws and two logarithms of [C, K, M]: 16 C K M
    vocabulary  codes of a code memory, on the first stage: the fp32 copy of a rank's V / TP
                embeddings in bf16; beside their weights, and weighed, ``[V / TP, H + 1]`` each
    save        the distributed optimizer's state goes to every rank of a bucket, one of its three
                tensors at a time: the bucket in fp32, beside this rank's shard of it
"""

from __future__ import annotations

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.plan.codebook_bytes import MAX_CANDIDATES
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.plan.memory_shape import MemoryShape
from vqmoe_megatron.plan.parameters import chunk_places, num_moe_layers, padded_vocab_size
from vqmoe_megatron.plan.shape import LayerShape
from vqmoe_megatron.plan.state_memory import stage_buffers

FP32_BYTES = 4
VOCABULARY_TENSORS = 2
EMA_TENSORS, REVIVED_EMA_TENSORS, REVIVED_TENSORS, REANCHOR_TENSORS = 3, 6, 2, 4


def candidate_bytes(config: RunConfig, layout: ParallelLayout, pipeline_rank: int) -> int:
    """Tokens offered to replace dead codes, fp32 ``[M, C, D]`` for every layer of a stage; at the
    end of the step every rank has them all."""
    return _bytes_of_candidates(config, layout, pipeline_rank, _num_candidates(config))


def held_candidate_bytes(
    config: RunConfig, layout: ParallelLayout, pipeline_rank: int, num_microbatches: int
) -> int:
    """What a rank of the first replica offers in its first ``num_microbatches`` microbatches and
    holds until the end of the step; of the first microbatch alone where that fills the table."""
    shards = layout.tensor_model_parallel_size
    tokens = config.train.micro_batch_size * config.model.seq_length
    num_rows = 0
    for number in range(num_microbatches):
        left = _num_candidates(config) - number * layout.data_parallel_size * tokens
        if left <= 0:
            break
        num_rows += -(-min(tokens, left) // shards)
    return _bytes_of_candidates(config, layout, pipeline_rank, num_rows)


def _num_candidates(config: RunConfig) -> int:
    return min(config.vq.num_codes, MAX_CANDIDATES)


def _bytes_of_candidates(
    config: RunConfig, layout: ParallelLayout, pipeline_rank: int, num_rows: int
) -> int:
    layer, vq = LayerShape.from_config(config, layout), config.vq
    if not vq.has_codes:
        return 0
    num_layers = num_moe_layers(config.model, chunk_places(config.model, layout, pipeline_rank))
    return num_layers * num_rows * vq.num_code_slices * layer.code_width * FP32_BYTES


def codebook_move_bytes(config: RunConfig, layout: ParallelLayout) -> int:
    """Temporaries of one codebook's move."""
    layer, vq = LayerShape.from_config(config, layout), config.vq
    if not vq.has_codes or vq.freeze_codebook:
        return 0
    if vq.codebook_update == "reanchor":
        return REANCHOR_TENSORS * layer.num_code_rows * _num_candidates(config) * FP32_BYTES
    revives = vq.dead_code_threshold > 0
    if vq.codebook_update == "ema":
        num_tensors = REVIVED_EMA_TENSORS if revives else EMA_TENSORS
    else:
        num_tensors = REVIVED_TENSORS if revives else 0
    return num_tensors * layer.num_code_rows * layer.code_width * FP32_BYTES


def step_end_bytes(
    config: RunConfig,
    layout: ParallelLayout,
    pipeline_rank: int,
) -> int:
    """Most that is made at once between the last backward pass and the next step."""
    codebooks = candidate_bytes(config, layout, pipeline_rank)
    codebooks += codebook_move_bytes(config, layout)
    return max(codebooks, vocabulary_bytes(config, layout) if pipeline_rank == 0 else 0)


def vocabulary_bytes(config: RunConfig, layout: ParallelLayout) -> int:
    """Temporaries of one round of k-means over a rank's share of the vocabulary."""
    memory = config.code_memory
    if not (memory.is_on and (shape := MemoryShape.from_config(config, layout)).moves):
        return 0
    is_learned = shape.groups_entries and memory.codes == "embedding"
    width = config.model.hidden_size
    per_entry = VOCABULARY_TENSORS * (width + 1) if is_learned else 0
    per_entry += width if config.model.bf16 else 0
    entries = padded_vocab_size(config.model) // layout.tensor_model_parallel_size
    return entries * per_entry * FP32_BYTES


def save_bytes(config: RunConfig, layout: ParallelLayout, pipeline_rank: int) -> int:
    """Most that a save makes on the device; the whole state that it gathers lies on the host."""
    if not config.optimizer.use_distributed_optimizer:
        return 0
    gathered = 0
    for buffer in stage_buffers(config, layout, pipeline_rank):
        bucket = max(end - start for start, end in buffer.buckets)
        gathered = max(gathered, (bucket + bucket // buffer.num_ranks) * FP32_BYTES)
    return gathered
