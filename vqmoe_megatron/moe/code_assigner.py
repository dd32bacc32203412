"""Tokens to codes to experts, with the losses and statistics that belong to it.

T local tokens, H hidden size, C codes per token, K codes per slice, N experts.

1. Bring tokens into the codebook's space; initialise the codebook at the first sight of data.
2. Search the nearest codes [T, C].
3. Map codes to experts [T, C].
4. ``attach`` hangs the VQ losses and the step statistics on an activation, so that both follow the
   gradient: through pipeline stages, accumulation and recompute, never in evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.moe.backward_hook import run_in_backward
from vqmoe_megatron.moe.codebook_data_init import initialize_codebook
from vqmoe_megatron.moe.step_statistics import KeepsStatistics
from vqmoe_megatron.vq.code_map import CodeMap
from vqmoe_megatron.vq.codebook import build_codebook
from vqmoe_megatron.vq.codebook_update import StepStatistics
from vqmoe_megatron.vq.losses import quantization_losses

MAX_CANDIDATES = 4096  # tokens per step and layer kept to replace dead codes


@dataclass(frozen=True)
class Assignment:
    """What the assigner found for T tokens."""

    prepared: torch.Tensor  # [T, H] tokens in the codebook's space
    codes: torch.Tensor  # int64 [T, C], codes within their slice
    rows: torch.Tensor  # int64 [T, C], slice * K + code
    experts: torch.Tensor  # int64 [T, C]


class CodeAssigner(KeepsStatistics):
    """One layer's codebook and code map, and how tokens meet them."""

    step_losses: torch.Tensor  # fp32 [3]: sum of commitment, of codebook loss, microbatches

    def __init__(
        self,
        config: TransformerConfig,
        vq: VQConfig,
        pg_collection: ProcessGroupCollection,
        seed: int,
    ) -> None:
        super().__init__()
        vq.check_model(config.hidden_size, config.num_moe_experts)
        self.config = config
        self.vq = vq
        self.pg_collection = pg_collection
        self.base_seed = seed
        self.codebook = build_codebook(vq, config.hidden_size, seed)
        self.code_map = CodeMap(vq.num_code_slices, vq.num_codes, config.num_moe_experts)
        self.register_buffer("step_losses", torch.zeros(3), persistent=False)
        self.step_candidate_slots: torch.Tensor | None = None
        for parameter in self.codebook.parameters():
            # Replicated over TP while every TP rank sees its own sequence shard.
            parameter.sequence_parallel = config.sequence_parallel
        self.to(torch.cuda.current_device())

    def set_layer_number(self, layer_number: int) -> None:
        """Give every layer its own random choices."""
        self.codebook.reseed(self.base_seed * 1009 + layer_number)

    def forward(self, x: torch.Tensor) -> Assignment:
        """Assign codes and experts to tokens ``[T, H]``.

        Communicates only at the first call on an uninitialised codebook (over ``tp`` and
        ``tp_dp_cp``).
        """
        prepared = self.codebook.prepare(x)
        if self.codebook.needs_data_init:
            initialize_codebook(self.codebook, self.code_map, prepared, self.pg_collection)
        codes = self.codebook(prepared)
        return Assignment(
            prepared=prepared,
            codes=codes,
            rows=self.code_map.row_ids(codes),
            experts=self.code_map(codes),
        )

    def attach(self, activation: torch.Tensor, assignment: Assignment) -> torch.Tensor:
        """Return ``activation`` carrying the VQ losses and the step's statistics.

        The loss is vq_loss_coeff * (codebook + commitment_coeff * commitment), each a mean over all
        T * H elements of the microbatch. Under sequence parallelism a rank sees 1 / TP of them, and
        gradients sum over TP, so the local mean is divided by TP. No communication.
        """
        if not (self.training and torch.is_grad_enabled()):
            return activation
        commitment, codebook = quantization_losses(
            assignment.prepared, self.codebook.code_vectors(), assignment.codes
        )
        loss = self.vq.commitment_coeff * commitment
        if self.codebook.codes.requires_grad:
            loss = loss + codebook
        loss = loss * (self.vq.vq_loss_coeff / self.pg_collection.tp.size())
        if self.config.calculate_per_token_loss:
            # Megatron then divides by the number of tokens of the global batch.
            loss = loss * (assignment.codes.shape[0] * self.pg_collection.tp.size())
        activation = MoEAuxLossAutoScaler.apply(activation, loss)
        losses = torch.stack([commitment.detach(), codebook.detach(), torch.ones_like(commitment)])
        return run_in_backward(activation, lambda: self._record(assignment, losses))

    def _record(self, assignment: Assignment, losses: torch.Tensor) -> None:
        self.step_losses += losses.to(self.step_losses.dtype)
        positions = None
        if self._offers_candidates and self.step_candidate_slots is None:
            self.step_candidate_slots, positions = self._candidate_places(assignment.codes.shape[0])
        self.codebook.record(assignment.prepared, assignment.codes, positions)

    @property
    def _offers_candidates(self) -> bool:
        """Whether this rank's tokens may replace dead codes: those of the first data-parallel rank,
        whose first microbatch holds the same samples at every data-parallel size."""
        group = self.pg_collection.tp_dp_cp
        return group.rank() < self.pg_collection.tp.size()

    @property
    def num_candidates(self) -> int:
        """M, tokens offered per step to replace dead codes."""
        return min(self.vq.num_codes, MAX_CANDIDATES)

    def _candidate_places(self, num_local_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots of the candidate table that this rank fills, and its token positions, int64 each.

        Candidate j is the token at position j * T_full // M of the full sequence order, so the
        table does not depend on how the sequence is sharded over TP. Shard r of TP holds the
        positions from r T_full / TP on, so the j from r M / TP, rounded up, on.
        """
        rank, num_shards = self.pg_collection.tp.rank(), self.pg_collection.tp.size()
        num_candidates = self.num_candidates
        first, end = (-(-shard * num_candidates // num_shards) for shard in (rank, rank + 1))
        slots = torch.arange(first, end, device=self.codebook.codes.device)
        positions = slots * (num_local_tokens * num_shards) // num_candidates
        return slots, positions - rank * num_local_tokens

    def candidate_table(self) -> torch.Tensor:
        """fp32 ``[M, C, D]``, filled in this rank's slots; the sum over ranks is the table."""
        codebook, slots = self.codebook, self.step_candidate_slots
        if codebook.step_candidates is not None and slots.numel() == self.num_candidates:
            return codebook.step_candidates
        table = codebook.step_count.new_zeros(
            self.num_candidates, codebook.num_slices, codebook.width
        )
        if codebook.step_candidates is not None:
            table[slots] = codebook.step_candidates
        return table

    def local_parts(self) -> list[torch.Tensor]:
        """This rank's fp32 sums of the step, in the order in which :meth:`apply_parts` takes them.

        No communication.
        """
        codebook = self.codebook
        totals = [codebook.step_total] if codebook.keeps_sums else []
        return [self.step_losses, codebook.step_count, *totals, self.candidate_table()]

    def apply_parts(
        self, reduced: Iterator[torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Move the codebook by the sums over its replicas.

        Returns fp32 scalars by metric name, and code usage ``[C, K]`` in tokens. No communication.
        """
        losses, count = next(reduced), next(reduced)
        total = next(reduced) if self.codebook.keeps_sums else None
        usage = count.clone()  # the codebook's step clears its counts
        scalars = self.codebook.apply_step(StepStatistics(count, total, next(reduced)))
        return scalars | _loss_scalars(losses), usage

    def scalars_of(self, parts: Iterator[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Code usage and VQ losses of the sums over replicas, fp32 scalars. Moves nothing."""
        losses, usage = next(parts), next(parts)
        return self.codebook.usage_scalars(usage) | _loss_scalars(losses)

    def clear_step(self) -> None:
        """Forget the step's losses, candidates and what the codebook recorded."""
        self.step_losses.zero_()
        self.step_candidate_slots = None
        self.codebook.clear_step()


def _loss_scalars(losses: torch.Tensor) -> dict[str, torch.Tensor]:
    """Means over microbatches of summed ``[commitment, codebook loss, microbatches]``."""
    num_microbatches = losses[2].clamp(min=1.0)
    return {
        "commitment_loss": losses[0] / num_microbatches,
        "codebook_loss": losses[1] / num_microbatches,
    }
