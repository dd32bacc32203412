"""The codes of the vocabulary: found once per optimizer step, until they are frozen.

V vocabulary entries (padded), K codes, H hidden size, d context width.

While gradients are reduced, the first pipeline stage does one round of weighted k-means over the
vocabulary (``vq/vocabulary_codes``) on its shards of the embedding, and sends what the next step
uses to all stages. A skipped step drops it. After ``freeze_after_steps`` nothing of it happens.

Replicas are equal bit by bit: stages receive, tensor-parallel ranks gather, and data-parallel ranks
compute the same from reduced sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from vqmoe_megatron.config import CodeMemoryConfig
from vqmoe_megatron.config.memory_codebooks import context_quantizer
from vqmoe_megatron.moe.candidates import Candidates
from vqmoe_megatron.moe.memory.rank_shares import gathered
from vqmoe_megatron.moe.memory.vocabulary_round import Entries, moved_codes
from vqmoe_megatron.moe.step_owner import StepOwner
from vqmoe_megatron.vq import vocabulary_codes
from vqmoe_megatron.vq.codebook import Codebook, code_perplexity
from vqmoe_megatron.vq.codebook_update import StepStatistics
from vqmoe_megatron.vq.host_draws import StepsTaken
from vqmoe_megatron.vq.keeps_float32 import KeepsFloat32
from vqmoe_megatron.vq.segment_sum import count_ids

SHARE_DECAY = 0.99  # of how often each vocabulary entry is seen
USED_TABLES = ("code_of_token", "context_table", "context_codes")  # by every stage
MODEL_LEVEL = 0  # the layer number under which the stream's metrics are shown


class CodeSearch(KeepsFloat32, StepOwner):
    """The part of a model chunk's stream of codes that its step's end talks to.

    Args:
        config: of the model.
        memory: settings; ``codes`` other than hidden decide what is kept here.
        vocab_size: V, padded.
        pg_collection: ``tp``, ``cp``, ``tp_dp_cp``.
        seed: of random codes and projections, the same on all ranks.
        chunk: number of the virtual pipeline chunk.
        leader: the search of this rank's first chunk; None for that one.

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
        chunk: int,
        leader: CodeSearch | None,
    ) -> None:
        super().__init__()
        self.config, self.memory, self.pg_collection = config, memory, pg_collection
        self.layer_number = MODEL_LEVEL
        self.on_every_stage = True
        self.chunk = chunk
        self.leader = () if leader is None else (leader,)  # a tuple: no module of this one
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
        self.is_first = leader is None and _is_first_stage()
        self.is_source = self.moves and self.is_first
        width = memory.context_dim
        if memory.num_context_codes:
            shape = memory.num_context_codes, width
            self.register_buffer("context_table", torch.zeros(vocab_size, width))
            self.register_buffer("context_codes", torch.zeros(shape))
        if self.is_source:
            drawn = torch.randn(num_codes, config.hidden_size, generator=generator)
            self.register_buffer("codes", drawn * config.embedding_init_method_std)
            self.register_buffer("share", torch.zeros(vocab_size))
            if memory.num_context_codes:
                self.contexts = Codebook(context_quantizer(memory), width, seed * 1009 + 11)
                projection = torch.randn(config.hidden_size, width, generator=generator)
                self.register_buffer("projection", projection / width**0.5, persistent=False)
        self.register_buffer("step_tokens", torch.zeros(vocab_size), persistent=False)

    @torch.no_grad()
    def count(self, token_ids: torch.Tensor) -> None:
        """Count this rank's token ids int64 ``[T]`` of one microbatch. No communication."""
        self.step_tokens += count_ids(token_ids, self.step_tokens.numel())

    @torch.no_grad()
    def count_contexts(self, contexts: torch.Tensor, codes: torch.Tensor) -> None:
        """Record this rank's contexts ``[T, d]`` of one microbatch, and their codes int64 ``[T]``.
        No communication."""
        positions = self.candidates.offer(contexts.shape[0], contexts.device)
        self.contexts.record(contexts, codes.unsqueeze(1), positions)

    @property
    def is_frozen(self) -> bool:
        """Whether codes stay as they are from now on; equal on all ranks."""
        limit = self.memory.freeze_after_steps
        return limit is not None and self._steps_taken.read(self.num_steps) >= limit

    @property
    def records_contexts(self) -> bool:
        """Whether this step's contexts move their codebook, or begin it; equal on all ranks.

        In the first step their table is empty. At the second's end the codebook begins; the third
        still reads by the codes from before.
        """
        step = self._steps_taken.read(self.num_steps)
        return bool(self.memory.num_context_codes) and step not in (0, 2)

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
        """Tokens seen ``[V]``, and of contexts what a codebook keeps; nothing once frozen."""
        if not self.is_source or self.is_frozen:
            return []
        parts = [self.step_tokens]
        if self.memory.num_context_codes:
            contexts = self.contexts
            shape = (1, self.memory.context_dim)
            offered = self.candidates.table(contexts.step_candidates, shape, contexts.step_total)
            parts += [contexts.step_count, contexts.step_total, offered]
        return parts

    def scalars_of(self, parts: Iterator[torch.Tensor]) -> dict[str, torch.Tensor]:
        """What tokens seen say of their codes, on the first stage."""
        if not self.is_source or self.is_frozen:
            return {}
        return self._scalars(next(parts))

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
        scalars: dict[str, torch.Tensor] = {}
        if self.moves and not self.is_frozen:
            if self.is_source:
                scalars = self._apply_shares(reduced)
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
            statistics = StepStatistics(next(reduced), next(reduced), next(reduced))
            if self.records_contexts:
                scalars |= self._move_contexts(statistics)
        return scalars

    def _move_contexts(self, statistics: StepStatistics) -> dict[str, torch.Tensor]:
        if self.contexts.needs_data_init:
            self.contexts.initialize_from(statistics.candidates.flatten(1))
            self.contexts.clear_step()
            return {}
        moved = self.contexts.apply_step(statistics)  # which clears the statistics
        return {"context_perplexity": moved["code_perplexity"]}

    def clear_step(self) -> None:
        """Forget the step's counts, and the codes that were to follow. No communication."""
        super().clear_step()
        self._pending = None
        self.step_tokens.zero_()
        self.candidates.clear()
        if self.is_source and self.memory.num_context_codes:
            self.contexts.clear_step()

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
