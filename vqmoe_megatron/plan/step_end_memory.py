"""What a rank makes between two steps: candidates, the codebooks' moves, Adam's temporaries, and
what a save gathers.

C code slices, K codes per slice, D slice width, M candidates, u = 4 C K D bytes. Activations are
gone by then. The temporaries are those of ``vq/codebook_update.py``, one layer at a time, and of
torch's Adam, one parameter at a time; fused optimizers make none (on CUDA torch's is fused, too:
``local`` kernels then plan too much).

    ema         moved sums, their quotient, codes; with revival also the replacements, and sums and
                codes with them: 6 u (3 u without revival)
    gradient    replacements and codes: 2 u (nothing without revival)
    reanchor    similarities, draws and two logarithms of [C, K, M]: 16 C K M
    Adam        root and quotient of a parameter, beside the quotient of the one before: 3 of the
                largest piece in fp32
    vocabulary  codes of a code memory, on the first stage: the fp32 copy of a rank's V / TP
                embeddings in bf16, those weighed, differences to their codes and their squares
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
from vqmoe_megatron.plan.state_memory import StateBytes, stage_buffers

FP32_BYTES = 4
ADAM_TENSORS = VOCABULARY_TENSORS = 3
EMA_TENSORS, REVIVED_EMA_TENSORS, REVIVED_TENSORS, REANCHOR_TENSORS = 3, 6, 2, 4


def candidate_bytes(
    config: RunConfig, layout: ParallelLayout, pipeline_rank: int, num_shards: int
) -> int:
    """Tokens offered to replace dead codes, fp32 ``[M / num_shards, C, D]`` for every layer of a
    stage: from the first backward pass on a rank of the first replica holds its tensor-parallel
    share, at the end of the step every rank the whole."""
    layer, vq = LayerShape.from_config(config, layout), config.vq
    if vq.path == "continuous":
        return 0
    num_layers = num_moe_layers(config.model, chunk_places(config.model, layout, pipeline_rank))
    num_rows = -(-min(vq.num_codes, MAX_CANDIDATES) // num_shards)
    return num_layers * num_rows * vq.num_code_slices * layer.code_width * FP32_BYTES


def codebook_move_bytes(config: RunConfig, layout: ParallelLayout) -> int:
    """Temporaries of one codebook's move."""
    layer, vq = LayerShape.from_config(config, layout), config.vq
    if vq.path == "continuous" or vq.freeze_codebook:
        return 0
    if vq.codebook_update == "reanchor":
        num_candidates = min(vq.num_codes, MAX_CANDIDATES)
        return REANCHOR_TENSORS * layer.num_code_rows * num_candidates * FP32_BYTES
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
    kernels: str,
    state: StateBytes,
) -> int:
    """Most that is made at once between the last backward pass and the next step. With ``fused``
    kernels the optimizer makes nothing."""
    codebooks = candidate_bytes(config, layout, pipeline_rank, 1)
    codebooks += codebook_move_bytes(config, layout)
    optimizer = ADAM_TENSORS * state.largest_piece if kernels == "local" else 0
    vocabulary = vocabulary_bytes(config, layout) if pipeline_rank == 0 else 0
    return max(codebooks, optimizer, vocabulary)


def vocabulary_bytes(config: RunConfig, layout: ParallelLayout) -> int:
    """Temporaries of one round of k-means over a rank's share of the vocabulary."""
    memory = config.code_memory
    if not (memory.is_on and MemoryShape.from_config(config, layout).moves):
        return 0
    num_tensors = VOCABULARY_TENSORS if memory.codes == "embedding" else 0
    num_tensors += 1 if config.model.bf16 else 0
    entries = padded_vocab_size(config.model) // layout.tensor_model_parallel_size
    return num_tensors * entries * config.model.hidden_size * FP32_BYTES


def save_bytes(config: RunConfig, layout: ParallelLayout, pipeline_rank: int) -> int:
    """Most that a save makes on the device; the whole state that it gathers lies on the host."""
    if not config.optimizer.use_distributed_optimizer:
        return 0
    gathered = 0
    for buffer in stage_buffers(config, layout, pipeline_rank):
        bucket = max(end - start for start, end in buffer.buckets)
        gathered = max(gathered, (bucket + bucket // buffer.num_ranks) * FP32_BYTES)
    return gathered
