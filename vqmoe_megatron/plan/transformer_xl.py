"""What Transformer-XL's attention takes beside the standard one: parameters, work, and bytes.

b micro batch, S sequence length, M tokens of memory, L = M + S keys, t = b S, H hidden size, A
heads and G groups of d columns, e bytes per element; all of one layer, one microbatch, one of TP
tensor-parallel ranks, whose heads are A / TP. A memory is counted as full, as it is after M / S
steps.

    parameters    position_weight [A d, H], content_bias and position_bias [A d]
    operations    keys and values of the memory 4 b M H G d; vectors of the distances 2 L H A d,
                  backward as much again (the sinusoids have no gradient); scores by content and by
                  position and the weighted values 6 t L A d
    kept          between the passes: :func:`kept_bytes`
    memory        from step to step: M b H e of every microbatch and layer, on every TP rank whole
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vqmoe_megatron.config import ModelConfig, RunConfig
from vqmoe_megatron.plan.layout import ParallelLayout

MASK_BYTES = 1
FP32_BYTES = 4
# Tensors of scores that are alive at once within a pass beside what is kept: by content, by
# distance and shifted are three, when the softmax, which is counted as kept, is not there yet.
NUM_SCORE_TENSORS = 2


def is_relative(model: ModelConfig) -> bool:
    """Whether the model has this attention."""
    return model.attention == "transformer_xl"


@dataclass(frozen=True)
class RelativeShape:
    """One layer's attention on one rank, as the letters above."""

    batch: int
    length: int
    memory: int
    hidden: int
    heads: int  # of this rank
    groups: int
    columns: int
    element: int

    @classmethod
    def from_config(cls, config: RunConfig, layout: ParallelLayout) -> RelativeShape:
        """Of a recipe at a layout that passed the check."""
        model, shards = config.model, layout.tensor_model_parallel_size
        heads = model.num_attention_heads
        return cls(
            batch=config.train.micro_batch_size,
            length=model.seq_length,
            memory=model.memory_length_tokens,
            hidden=model.hidden_size,
            heads=heads // shards,
            groups=(model.num_query_groups or heads) // shards,
            columns=model.kv_channels or model.hidden_size // heads,
            element=2 if model.bf16 else 4,
        )

    @property
    def num_keys(self) -> int:
        """L."""
        return self.memory + self.length

    @property
    def memory_flops(self) -> int:
        """Forward, keys and values of the memory."""
        return 4 * self.batch * self.memory * self.hidden * self.groups * self.columns

    @property
    def distance_flops(self) -> int:
        """Forward, vectors of the distances."""
        return 2 * self.num_keys * self.hidden * self.heads * self.columns

    @property
    def score_flops(self) -> int:
        """Forward, both scores and the weighted values."""
        return 6 * self.batch * self.length * self.num_keys * self.heads * self.columns

    @property
    def memory_bytes(self) -> int:
        """Of one microbatch of one layer, from step to step."""
        return self.memory * self.batch * self.hidden * self.element

    @property
    def num_scores(self) -> int:
        """Of all heads of this rank."""
        return self.batch * self.heads * self.length * self.num_keys


def score_bytes(config: RunConfig, shape: RelativeShape) -> int:
    """The softmax in fp32, its cast in bf16 or mask and result of dropout, and the causal mask."""
    per_score = FP32_BYTES + (shape.element if config.model.bf16 else 0)
    if config.model.attention_dropout > 0:
        per_score = FP32_BYTES + 2 * shape.element
    return shape.num_scores * per_score + shape.length * shape.num_keys * MASK_BYTES


def transient_bytes(config: RunConfig, layout: ParallelLayout) -> int:
    """Made within a pass of one layer; 0 for another attention, whose scores are counted."""
    if not is_relative(config.model):
        return 0
    shape = RelativeShape.from_config(config, layout)
    return NUM_SCORE_TENSORS * shape.num_scores * shape.element


def kept_bytes(shape: RelativeShape, norm_bytes_of_segment: int) -> int:
    """Kept of projections, distances and memory; scores and the segment's norms are not in it.

    Queries with either bias, the context, keys and values. Without memory and groups the latter lie
    in the output of the projection; behind a memory they are joined, with groups repeated. The
    memory is kept as its norm read and made it, with the rows of the weight that project it.
    """
    query = shape.batch * shape.length * shape.heads * shape.columns * shape.element
    total = 3 * query + shape.num_keys * (shape.heads * shape.columns + shape.hidden) * (
        shape.element
    )
    if shape.memory or shape.groups != shape.heads:
        of_keys = shape.batch * shape.num_keys * shape.heads * shape.columns * shape.element
        total += 2 * of_keys
    else:
        total += 3 * query
    if not shape.memory:
        return total
    total += norm_bytes_of_segment * shape.memory // shape.length
    return total + 2 * shape.groups * shape.columns * shape.hidden * shape.element


def segment_memory_bytes(config: RunConfig, layout: ParallelLayout, layers: Iterable[int]) -> int:
    """Of all microbatches of a step, in these layers of one rank."""
    if not config.model.memory_length_tokens:
        return 0
    shape = RelativeShape.from_config(config, layout)
    num_microbatches = layout.num_microbatches(config.train)
    return len(list(layers)) * num_microbatches * shape.memory_bytes
