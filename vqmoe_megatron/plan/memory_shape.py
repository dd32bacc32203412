"""The code memory of one layer on one rank, as the cost formulas see it.

T local tokens of a microbatch, t tokens of its whole sequences, A addresses per token, R = A M rows
per layer on W = P E ranks, expert-parallel times expert-tensor, H hidden size, V vocabulary
(padded), K codes, U distinct rows that a rank reads.

U depends on the data. Planned is an upper bound (``distinct_rows``), an equal share of each owner.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

from vqmoe_megatron.config import CodeMemoryConfig, RunConfig
from vqmoe_megatron.config.memory_codebooks import context_quantizer, hidden_quantizer
from vqmoe_megatron.plan.codebook_bytes import MAX_CANDIDATES
from vqmoe_megatron.plan.distinct_rows import (
    TABLE_MAY_BE_LARGER,
    balanced_rows_per_owner,
    distinct_of_text,
    expected_distinct,
    gathers_table,
)
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.plan.parameters import ChunkPlace, is_moe_layer, padded_vocab_size
from vqmoe_megatron.plan.shape import LayerShape


@dataclass(frozen=True)
class RowReads:
    """Rows of a code memory that one rank moves for one layer and microbatch."""

    num_wanted: int | Fraction  # distinct rows that it reads and other ranks own
    num_asked: int | Fraction  # its own rows that other ranks read


@dataclass(frozen=True)
class MemoryShape:
    """Sizes of the memory; ``memory.is_on`` holds."""

    memory: CodeMemoryConfig
    layer: LayerShape  # the layer that carries it
    num_tokens: int  # t
    vocab_size: int  # V

    @classmethod
    def from_config(cls, config: RunConfig, layout: ParallelLayout) -> MemoryShape:
        """Return the memory of a recipe on the ranks of ``layout``."""
        layer = LayerShape.from_config(config, layout)
        num_tokens = config.train.micro_batch_size * config.model.seq_length
        return cls(config.code_memory, layer, num_tokens, padded_vocab_size(config.model))

    @property
    def num_ranks(self) -> int:
        """W."""
        return self.layer.expert_model_parallel_size * self.layer.expert_tensor_parallel_size

    @property
    def rows_per_rank(self) -> int:
        """R / W."""
        return self.memory.rows_per_layer // self.num_ranks

    @property
    def num_reads(self) -> int:
        """T A."""
        return self.layer.num_local_tokens * self.memory.num_addresses

    @property
    def expected_distinct(self) -> float:
        """U at most, in the mean."""
        return expected_distinct(self.num_reads, self.memory.rows_per_layer)

    @property
    def is_table(self) -> bool:
        """Whether every rank gathers all rows."""
        if self.num_ranks == 1:
            return False
        return gathers_table(self.memory.exchange, self.num_reads, self.memory.rows_per_layer)

    @property
    def rows_per_owner(self) -> int:
        """Planned rows that a rank asks of each owner."""
        return balanced_rows_per_owner(self.num_reads, self.memory.rows_per_layer, self.num_ranks)

    @property
    def num_fetched(self) -> int:
        """Rows of a layer that lie on a rank while it reads: its own alone, all, or planned U."""
        if self.num_ranks == 1 or self.is_table:
            return self.memory.rows_per_layer
        return self.num_ranks * self.rows_per_owner

    @property
    def balanced_reads(self) -> RowReads:
        """What is planned of the rows that travel."""
        away = (self.num_ranks - 1) * self.rows_per_owner
        return RowReads(away, away)

    @property
    def form_in_words(self) -> str:
        """How rows reach their readers, and why so."""
        if self.num_ranks == 1:
            return "on the rank itself"
        total, distinct = self.memory.rows_per_layer, self.expected_distinct
        counts = f"{total:,} rows, at most {distinct:,.0f} of them read by a rank's microbatch"
        form = "table: all rows are gathered" if self.is_table else "rows: those read travel"
        if self.memory.exchange != "auto":
            return f"{form} (code_memory.exchange={self.memory.exchange}; {counts})"
        of_text = distinct_of_text(self.num_reads, total)
        sign = "<=" if self.is_table else ">"
        return (
            f"{form} ({counts}, of text about {of_text:,.0f}: {total:,} {sign} "
            f"{TABLE_MAY_BE_LARGER} x {of_text:,.0f})"
        )

    @property
    def hidden_layer(self) -> LayerShape:
        """The layer as the codebook of ``code_memory.codes=hidden`` sees it."""
        return replace(self.layer, vq=hidden_quantizer(self.layer.vq, self.memory))

    @property
    def moves(self) -> bool:
        """Whether codes of tokens are found once per step: before they are frozen."""
        return self.memory.moves(self.vocab_size) and self.memory.freeze_after_steps != 0

    @property
    def groups_entries(self) -> bool:
        """Whether codes of the embedding are found, and not those of contexts alone."""
        return self.memory.groups_entries(self.vocab_size)

    @property
    def num_usage_sums(self) -> int:
        """Of ``moe/memory/row_usage.py``: reads of every row, distinct rows, and plans."""
        return self.memory.rows_per_layer + 2

    @property
    def num_context_candidates(self) -> int:
        """Contexts that are offered per step to replace dead codes."""
        return min(self.memory.num_context_codes, MAX_CANDIDATES)

    @property
    def context_layer(self) -> LayerShape:
        """Contexts as a layer of width ``context_dim``, for what its codebook keeps."""
        width = self.memory.context_dim
        return replace(self.layer, vq=context_quantizer(self.memory), hidden_size=width)


def carries_memory(config: RunConfig, number: int) -> bool:
    """Whether the 0-based layer ``number`` has experts and memory."""
    return is_moe_layer(config.model, number) and config.code_memory.carries(number + 1)


def num_memory_layers(config: RunConfig, places: list[ChunkPlace]) -> int:
    """Layers of these chunks that carry memory."""
    return sum(carries_memory(config, number) for place in places for number in place.layers)
