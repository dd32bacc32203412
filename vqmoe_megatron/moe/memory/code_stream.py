"""The model's stream of codes: one per token, known from token ids before the first layer runs.

V vocabulary entries (padded), d context width, b sequences of S tokens, T tokens of this rank, A
addresses per token.

1. ``begin`` looks up the code of every token of a microbatch, ``[V]`` entries known for the step,
   and of its context; every rank does so for whole sequences, whatever its pipeline stage or
   sequence shard, and plans the rows of its own tokens once for all layers. Sequences that are cut
   over context-parallel ranks are put together first: ids are cheap.
2. Once per optimizer step codes are found anew (``code_search``), until they are frozen: from then
   on a token's code is a function of token ids alone, for good.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from vqmoe_megatron.config import CodeMemoryConfig
from vqmoe_megatron.moe.context_cut import gathered_in_order, own_part, own_shard
from vqmoe_megatron.moe.foreign_loop import follow
from vqmoe_megatron.moe.memory.code_search import CodeSearch
from vqmoe_megatron.moe.memory.microbatches import Microbatches
from vqmoe_megatron.moe.memory.row_plan import RowPlaces, RowPlan, RowPlanner, sharing_group
from vqmoe_megatron.moe.memory.row_usage import RowUsage
from vqmoe_megatron.vq.context_means import context_means
from vqmoe_megatron.vq.row_addresses import row_ids, tokens_before
from vqmoe_megatron.vq.search import nearest_code


@dataclass(frozen=True)
class Tokens:
    """One microbatch as layers see it."""

    starts: torch.Tensor  # bool [b, S], first tokens of documents
    plan: RowPlan | None  # of this rank's tokens; None where rows follow hidden states


class CodeStream(CodeSearch):
    """Codes of token ids, for all layers of one model chunk that carry memory.

    Args:
        config: of the model.
        memory: settings; ``codes`` other than hidden decide what is kept here.
        vocab_size: V, padded.
        pg_collection: ``tp``, ``cp``, ``tp_dp_cp``, ``tp_ep``, ``ep``, ``expt_tp``.
        seed: of random codes and projections, the same on all ranks.
        chunk: number of the virtual pipeline chunk.
        leader: the stream of this rank's first chunk; None for that one.

    """

    def __init__(
        self,
        config: TransformerConfig,
        memory: CodeMemoryConfig,
        vocab_size: int,
        pg_collection: ProcessGroupCollection,
        seed: int,
        chunk: int = 0,
        leader: CodeStream | None = None,
    ) -> None:
        super().__init__(config, memory, vocab_size, pg_collection, seed, chunk, leader)
        self.microbatches: Microbatches[Tokens] = Microbatches()
        self.places = RowPlaces(
            memory.rows_per_layer,
            config.num_moe_experts,
            pg_collection.ep.size(),
            pg_collection.expt_tp.size(),
        )
        self.group = sharing_group(pg_collection)
        # auto follows a microbatch's size, and ranks must choose alike.
        lengths_vary = memory.exchange == "auto" and config.variable_seq_lengths
        self.exchange = "rows" if lengths_vary else memory.exchange
        self.planner = RowPlanner()  # others count plans, or make them without data
        # Every stage plans the same rows; the first counts them. With codes=hidden layers do.
        counts = self.is_first and memory.codes != "hidden"
        self.row_usage = RowUsage(memory.num_addresses, memory.num_rows, None) if counts else None
        self.to(torch.cuda.current_device())

    # 1. microbatches
    def begin(self, token_ids: torch.Tensor, starts: torch.Tensor) -> None:
        """Plan the rows of one microbatch.

        Args:
            token_ids: int64 ``[b, S]``, whole sequences, or the part of them that this
                context-parallel rank holds.
            starts: bool, likewise: first tokens of documents.

        Communicates as :meth:`RowPlanner.plan`, and over ``cp`` one all-gather of ids and starts;
        every rank of ``tp_ep`` and ``cp`` must call it.
        """
        token_ids, starts = self._whole(token_ids, starts)
        is_trained = self.training and torch.is_grad_enabled()
        if is_trained:
            follow(self, self.config)
            self.recorded()
        if self.memory.codes == "hidden":
            self.microbatches.begin(Tokens(starts, None))
            return
        codes = self.code_of_token[token_ids]
        contexts, context_codes = None, None
        if self.memory.num_context_codes:
            contexts = self._contexts(token_ids, starts)
            flat = nearest_code(contexts.flatten(0, 1), self.context_codes)
            context_codes = flat.view_as(codes)
        rows = row_ids(codes, starts, self.memory.num_rows, self.memory.max_order, context_codes)
        rows = self._own(rows)
        plan = self.plan(rows)
        self.microbatches.begin(Tokens(starts, plan))
        if is_trained and self.row_usage is not None:
            self.row_usage.record(rows, plan)
        if is_trained and self.is_source and not self.is_frozen:
            self.count(self._own(token_ids))
            if self.records_contexts:
                self.count_contexts(self._own(contexts), self._own(context_codes))

    def plan(self, rows: torch.Tensor) -> RowPlan:
        """Plan row ids ``[T, A]`` of this rank's tokens; communicates as the planner."""
        return self.planner.plan(rows, self.places, self.exchange, self.group)

    def _whole(self, token_ids: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        cp = self.pg_collection.cp
        if cp.size() == 1:
            return token_ids, starts
        both = torch.stack([token_ids, starts.to(token_ids.dtype)], dim=-1)  # [b, S / CP, 2]
        whole_ids, whole_starts = gathered_in_order(both.transpose(0, 1), cp).unbind(-1)
        return whole_ids.t(), whole_starts.t().bool()

    def _own(self, of_sequences: torch.Tensor) -> torch.Tensor:
        """``[b, S, ...]`` of whole sequences -> ``[T, ...]`` of this rank's, in the order of hidden
        states ``[S, b]``."""
        by_place = own_part(of_sequences.transpose(0, 1), self.pg_collection.cp, 0)
        by_place = own_shard(by_place, self.pg_collection.tp, self.config.sequence_parallel)
        return by_place.flatten(0, 1)

    def _contexts(self, token_ids: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        vectors = self.context_table[token_ids]
        return context_means(vectors, tokens_before(starts), self.memory.context_decay)

    def follow_output(self, output: torch.Tensor) -> None:
        """The chunk's decoder gave ``output``; its backward pass belongs to this microbatch."""
        self.microbatches.follow(output)

    # 2. once per step
    def local_parts(self) -> list[torch.Tensor]:
        """Reads of rows, and until codes are frozen the search's."""
        usage = [] if self.row_usage is None else self.row_usage.local_parts()
        return usage + super().local_parts()

    def scalars_of(self, parts: Iterator[torch.Tensor]) -> dict[str, torch.Tensor]:
        """What reads say of rows, and the search's."""
        usage = {} if self.row_usage is None else self.row_usage.scalars_of(parts)
        return usage | super().scalars_of(parts)

    def apply_parts(self, reduced: Iterator[torch.Tensor]) -> tuple[dict, ...]:
        """Take the step's reads, and move the codes."""
        usage = {} if self.row_usage is None else self.row_usage.apply_parts(reduced)
        scalars, *others = super().apply_parts(reduced)
        return usage | scalars, *others

    def row_reads(self) -> torch.Tensor | None:
        """Of all layers alike, on the first stage."""
        return None if self.row_usage is None else self.row_usage.by_address()

    def clear_step(self) -> None:
        """Forget the step: its microbatches, what they read, and the search's. No communication."""
        super().clear_step()
        self.microbatches.clear()
        if self.row_usage is not None:
            self.row_usage.clear_step()
