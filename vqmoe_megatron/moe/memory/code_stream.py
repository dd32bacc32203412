"""The model's stream of codes: one per token, known from token ids before the first layer runs.

V vocabulary entries (padded), K codes, H hidden size, d context width, b sequences of S tokens.

1. ``begin`` looks up the code of every token of a microbatch, ``[V]`` entries known for the step,
   and of its context; every rank does so for whole sequences, whatever its pipeline stage or
   sequence shard, and plans the rows of its own tokens once for all layers.
2. Once per optimizer step, while gradients are reduced, the first pipeline stage does one round of
   weighted k-means over the vocabulary (``vq/vocabulary_codes``) on its shards of the embedding,
   and sends what the next step uses to all stages. A skipped step drops it.
3. After ``freeze_after_steps`` nothing of 2 happens any more: a token's code is a function of token
   ids alone, for good.

Replicas are equal bit by bit: stages receive, tensor-parallel ranks gather, and data-parallel ranks
compute the same from reduced sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from vqmoe_megatron.config import CodeMemoryConfig
from vqmoe_megatron.config.memory_codebooks import context_quantizer
from vqmoe_megatron.moe.candidates import Candidates
from vqmoe_megatron.moe.foreign_loop import follow
from vqmoe_megatron.moe.memory.microbatches import Microbatches
from vqmoe_megatron.moe.memory.rank_shares import gathered
from vqmoe_megatron.moe.memory.row_plan import RowPlaces, RowPlan, RowPlanner, sharing_group
from vqmoe_megatron.moe.memory.row_usage import RowUsage
from vqmoe_megatron.moe.memory.vocabulary_round import Entries, moved_codes
from vqmoe_megatron.moe.step_owner import StepOwner
from vqmoe_megatron.vq import vocabulary_codes
from vqmoe_megatron.vq.codebook import Codebook, code_perplexity
from vqmoe_megatron.vq.codebook_update import StepStatistics
from vqmoe_megatron.vq.context_means import context_means
from vqmoe_megatron.vq.host_draws import StepsTaken
from vqmoe_megatron.vq.keeps_float32 import KeepsFloat32
from vqmoe_megatron.vq.row_addresses import row_ids, tokens_before
from vqmoe_megatron.vq.search import nearest_code
from vqmoe_megatron.vq.segment_sum import count_ids

SHARE_DECAY = 0.99  # of how often each vocabulary entry is seen
USED_TABLES = ("code_of_token", "context_table", "context_codes")  # by every stage
MODEL_LEVEL = 0  # the layer number under which the stream's metrics are shown


@dataclass(frozen=True)
class Tokens:
    """One microbatch as layers see it."""

    starts: torch.Tensor  # bool [b, S], first tokens of documents
    plan: RowPlan | None  # of this rank's tokens; None where rows follow hidden states


class CodeStream(KeepsFloat32, StepOwner):
    """Codes of token ids, for all layers of one model chunk that carry memory.

    Args:
        config: of the model.
        memory: settings; ``codes`` other than hidden decide what is kept here.
        vocab_size: V, padded.
        pg_collection: ``tp``, ``tp_dp_cp``, ``tp_ep``, ``ep``, ``expt_tp``.
        seed: of random codes and projections, the same on all ranks.
        chunk: number of the virtual pipeline chunk.
        leader: the stream of this rank's first chunk; None for that one.

    """

    code_of_token: torch.Tensor  # int64 [V], of this step
    num_steps: torch.Tensor  # int64 scalar, steps applied

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
        super().__init__()
        self.config, self.memory, self.pg_collection = config, memory, pg_collection
        self.layer_number = MODEL_LEVEL
        self.on_every_stage = True
        self.chunk = chunk
        self.leader = () if leader is None else (leader,)  # a tuple: no module of this one
        self.microbatches: Microbatches[Tokens] = Microbatches()
        self.places = RowPlaces(
            memory.rows_per_layer,
            config.num_moe_experts,
            pg_collection.ep.size(),
            pg_collection.expt_tp.size(),
        )
        self.group = sharing_group(pg_collection)
        self.planner = RowPlanner()  # others count plans, or make them without data
        self._weight: tuple[torch.Tensor, ...] = ()  # this rank's rows of the embedding
        self._first_entry = 0
        self._pending: dict[str, torch.Tensor] | None = None
        self.candidates = Candidates(
            memory.num_context_codes, pg_collection, config.variable_seq_lengths
        )
        self._steps_taken = StepsTaken()
        # With a code for every entry nothing is left to learn: entries are their own codes.
        num_codes = min(memory.num_codes, vocab_size)
        self.groups = memory.groups_entries(vocab_size)
        entries = torch.arange(vocab_size)
        generator = torch.Generator().manual_seed(seed * 1009 + 7)
        if memory.codes == "frozen_random":
            entries = torch.randperm(vocab_size, generator=generator)
        codes = entries if memory.codes == "tokens" else entries % num_codes
        self.register_buffer("code_of_token", codes)
        self.register_buffer("num_steps", torch.tensor(0, dtype=torch.int64))
        self.moves = memory.moves(vocab_size)
        is_first = leader is None and _is_first_stage()
        self.is_source = self.moves and is_first
        # Every stage plans the same rows; the first counts them. With codes=hidden layers do.
        counts = is_first and memory.codes != "hidden"
        self.row_usage = RowUsage(memory.num_addresses, memory.num_rows, None) if counts else None
        width = memory.context_dim
        if memory.num_context_codes:
            shape = memory.num_context_codes, width
            self.register_buffer("context_table", torch.zeros(vocab_size, width))
            self.register_buffer("context_codes", torch.zeros(shape))
        if self.is_source:
            drawn = torch.randn(num_codes, config.hidden_size, generator=generator)
            self.register_buffer("codes", drawn * config.init_method_std)
            self.register_buffer("share", torch.zeros(vocab_size))
            if memory.num_context_codes:
                self.contexts = Codebook(context_quantizer(memory), width, seed * 1009 + 11)
                projection = torch.randn(config.hidden_size, width, generator=generator)
                self.register_buffer("projection", projection / width**0.5, persistent=False)
        self.register_buffer("step_tokens", torch.zeros(vocab_size), persistent=False)
        self.to(torch.cuda.current_device())

    # 1. microbatches
    def begin(self, token_ids: torch.Tensor, starts: torch.Tensor) -> None:
        """Plan the rows of one microbatch.

        Args:
            token_ids: int64 ``[b, S]``, whole sequences.
            starts: bool ``[b, S]``, first tokens of documents.

        Communicates as :meth:`RowPlanner.plan`; every rank of ``tp_ep`` must call it.
        """
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
        if is_trained and self.moves and not self.is_frozen:
            self._record(token_ids, contexts, context_codes)

    def plan(self, rows: torch.Tensor) -> RowPlan:
        """Plan row ids ``[T, A]`` of this rank's tokens; communicates as the planner."""
        return self.planner.plan(rows, self.places, self.memory.exchange, self.group)

    def _own(self, of_sequences: torch.Tensor) -> torch.Tensor:
        """``[b, S, ...]`` of whole sequences -> ``[T, ...]`` of this rank's, in the order of hidden
        states ``[S, b]``."""
        by_place = of_sequences.transpose(0, 1)
        if self.config.sequence_parallel:
            tp = self.pg_collection.tp
            by_place = by_place.chunk(tp.size(), dim=0)[tp.rank()]
        return by_place.flatten(0, 1)

    def _contexts(self, token_ids: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        vectors = self.context_table[token_ids]
        return context_means(vectors, tokens_before(starts), self.memory.context_decay)

    def follow_output(self, output: torch.Tensor) -> None:
        """The chunk's decoder gave ``output``; its backward pass belongs to this microbatch."""
        self.microbatches.follow(output)

    @torch.no_grad()
    def _record(
        self,
        token_ids: torch.Tensor,
        contexts: torch.Tensor | None,
        context_codes: torch.Tensor | None,
    ) -> None:
        """Count this rank's tokens, and what their contexts say, once per microbatch."""
        if not self.is_source:
            return
        self.step_tokens += count_ids(self._own(token_ids), self.step_tokens.numel())
        if contexts is not None and context_codes is not None:
            own = self._own(contexts)
            positions = self.candidates.offer(own.shape[0], own.device)
            self.contexts.record(own, self._own(context_codes).unsqueeze(1), positions)

    # 2. once per step
    @property
    def is_frozen(self) -> bool:
        """Whether codes stay as they are from now on; equal on all ranks."""
        limit = self.memory.freeze_after_steps
        return limit is not None and self._steps_taken.read(self.num_steps) >= limit

    @property
    def replica_group(self) -> torch.distributed.ProcessGroup:
        """``tp_dp_cp``."""
        return self.pg_collection.tp_dp_cp

    def bind(self, embedding: torch.nn.Module | None) -> None:
        """Name the chunk's word embedding, Megatron's vocabulary-parallel one; None: none here."""
        if embedding is not None:
            self._weight = (embedding.weight,)
            self._first_entry = embedding.vocab_start_index

    @torch.no_grad()
    def gather(self) -> None:
        """Find the codes of the next step, of this step's embeddings; kept until it is applied.

        Communicates over ``tp`` (all-gathers of ``[V]``, all-reduces of ``[K, H + 1]`` and
        ``[K, H]``) on the first pipeline stage, and one broadcast per table over the pipeline
        group; after the freeze not at all.
        """
        if not self.moves or self.is_frozen:
            return
        if self.leader:
            self._pending = self._used(self.leader[0]._pending)
            return
        state = self._next_state() if self.is_source else self._empty_state()
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            for value in self._used(state).values():
                torch.distributed.broadcast(
                    value,
                    src=parallel_state.get_pipeline_model_parallel_first_rank(),
                    group=parallel_state.get_pipeline_model_parallel_group(),
                )
        self._pending = state

    def _used(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: state[name] for name in USED_TABLES if name in state}

    def _empty_state(self) -> dict[str, torch.Tensor]:
        used = [name for name in USED_TABLES if hasattr(self, name)]
        return {name: torch.empty_like(getattr(self, name)) for name in used}

    def _next_state(self) -> dict[str, torch.Tensor]:
        """One round of k-means on this rank's entries, and what contexts are compared in."""
        embeddings = self._weight[0].detach().float()
        own = slice(self._first_entry, self._first_entry + embeddings.shape[0])
        codes, ids, tp = self.codes, self.code_of_token[own], self.pg_collection.tp
        if self.groups and self.memory.codes == "random":
            ids = vocabulary_codes.assign(embeddings, codes)
        elif self.groups:
            mine = Entries(embeddings, self.share[own], ids, own.start)
            codes = moved_codes(mine, codes, self.num_steps <= 1, tp)
            # Nothing was counted before the first step's end.
            found = vocabulary_codes.assign(embeddings, codes)
            ids = torch.where(self.share.sum() > 0, found, ids)
        state = {"codes": codes, "code_of_token": gathered(ids, tp)}
        if self.memory.num_context_codes:
            state["context_table"] = gathered(embeddings @ self.projection, tp)
            state["context_codes"] = self.contexts.codes.data[0].clone()
        return state

    def local_parts(self) -> list[torch.Tensor]:
        """Reads of rows; and until codes are frozen tokens seen ``[V]``, and of contexts what a
        codebook keeps."""
        parts = [] if self.row_usage is None else self.row_usage.local_parts()
        if not self.is_source or self.is_frozen:
            return parts
        parts.append(self.step_tokens)
        if self.memory.num_context_codes:
            contexts = self.contexts
            like = contexts.step_total.new_empty(1, self.memory.context_dim)
            offered = self.candidates.table(contexts.step_candidates, like)
            parts += [contexts.step_count, contexts.step_total, offered]
        return parts

    def scalars_of(self, parts: Iterator[torch.Tensor]) -> dict[str, torch.Tensor]:
        """What reads say of rows, and tokens seen of their codes, on the first stage."""
        scalars = {} if self.row_usage is None else self.row_usage.scalars_of(parts)
        if not self.is_source or self.is_frozen:
            return scalars
        return scalars | self._scalars(next(parts))

    def _scalars(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        of_codes = torch.zeros(self.codes.shape[0], device=tokens.device)
        of_codes.index_add_(0, self.code_of_token, tokens)
        seen = torch.zeros_like(of_codes).index_add_(0, self.code_of_token, self.share)
        return {
            "stream_perplexity": code_perplexity(of_codes.unsqueeze(0)),
            "stream_codes_in_use": (seen > 0).sum().float(),
        }

    def apply_parts(self, reduced: Iterator[torch.Tensor]) -> tuple[dict, ...]:
        """Take the step's shares and the codes that :meth:`gather` found."""
        scalars = {} if self.row_usage is None else self.row_usage.apply_parts(reduced)
        if self.moves and not self.is_frozen:
            if self.is_source:
                scalars |= self._apply_shares(reduced)
            if self._pending is not None:
                if self.is_source:
                    changed = self._pending["code_of_token"] != self.code_of_token
                    scalars["stream_change_rate"] = changed.float().mean()
                for name, value in self._pending.items():
                    getattr(self, name).copy_(value)
        if self.is_source:
            frozen = torch.full((), float(self.is_frozen), device=self.num_steps.device)
            scalars["stream_frozen"] = frozen
        self.num_steps += 1
        self._steps_taken.follow(self.num_steps)
        return scalars, None, None

    def _apply_shares(self, reduced: Iterator[torch.Tensor]) -> dict[str, torch.Tensor]:
        tokens = next(reduced)
        share = tokens / tokens.sum().clamp(min=1.0)
        first = (self.share.sum() == 0).float()
        self.share.lerp_(share, first + (1.0 - first) * (1.0 - SHARE_DECAY))
        scalars = self._scalars(tokens)
        if self.memory.num_context_codes:
            count, total, candidates = next(reduced), next(reduced), next(reduced)
            scalars["context_perplexity"] = code_perplexity(count)
            if self.contexts.needs_data_init:
                self.contexts.initialize_from(candidates.flatten(1))
                self.contexts.clear_step()
            else:
                self.contexts.apply_step(StepStatistics(count, total, candidates))
        return scalars

    def row_reads(self) -> torch.Tensor | None:
        """Of all layers alike, on the first stage."""
        return None if self.row_usage is None else self.row_usage.by_address()

    def clear_step(self) -> None:
        """Forget the step's counts, and the codes that were to follow. No communication."""
        super().clear_step()
        self._pending = None
        self.microbatches.clear()
        self.step_tokens.zero_()
        self.candidates.clear()
        if self.row_usage is not None:
            self.row_usage.clear_step()
        if self.is_source and self.memory.num_context_codes:
            self.contexts.clear_step()

    # 3. checkpoints
    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Every table once, from the first stage's first chunk. No communication."""
        stage = parallel_state.get_pipeline_model_parallel_rank()
        replica = (stage, self.chunk, self.pg_collection.tp_dp_cp.rank())
        return {
            f"{prefix}{name}": ShardedTensor.from_rank_offsets(
                f"{prefix}{name}", value, replica_id=replica
            )
            for name, value in self.state_dict().items()
        }


def _is_first_stage() -> bool:
    return parallel_state.get_pipeline_model_parallel_rank() == 0
