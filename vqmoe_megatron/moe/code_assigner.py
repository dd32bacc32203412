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
from vqmoe_megatron.moe.candidates import Candidates
from vqmoe_megatron.moe.codebook_data_init import initialize_codebook
from vqmoe_megatron.moe.frozen_codes import hold_frozen_codes
from vqmoe_megatron.moe.step_statistics import KeepsStatistics
from vqmoe_megatron.vq.code_map import CodeMap
from vqmoe_megatron.vq.codebook import build_codebook
from vqmoe_megatron.vq.codebook_update import StepStatistics


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
        self.candidates = Candidates(vq.num_codes, pg_collection, config.variable_seq_lengths)
        for parameter in self.codebook.parameters():
            # Replicated over TP while every TP rank sees its own sequence shard.
            parameter.sequence_parallel = config.sequence_parallel
        self.to(torch.cuda.current_device())

    def set_layer_number(self, layer_number: int) -> None:
        """Give every layer its own random choices."""
        self.codebook.reseed(self.base_seed * 1009 + layer_number)

    def forward(self, x: torch.Tensor) -> Assignment:
        """Assign codes and experts to tokens ``[T, H]``.

        Communicates only at the first call on an uninitialised codebook (over ``tp_cp``
        and ``tp_dp_cp``).
        """
        prepared = self.codebook(x)
        if self.codebook.needs_data_init:
            initialize_codebook(self.codebook, self.code_map, prepared, self.pg_collection)
        codes = self.codebook.search(prepared)
        return Assignment(
            prepared=prepared,
            codes=codes,
            rows=self.code_map.row_ids(codes),
            experts=self.code_map(codes),
        )

    def attach(self, activation: torch.Tensor, assignment: Assignment) -> torch.Tensor:
        """Return ``activation`` carrying the VQ losses and the step's statistics.

        The loss is vq_loss_coeff * (codebook + commitment_coeff * commitment), each a mean over all
        T * H elements of the microbatch. Under sequence and context parallelism a rank sees
        1 / (TP * CP) of them, and gradients sum over TP and CP (Megatron scales what is attached by
        CP, against the average over replicas), so the local mean is divided by TP * CP. A
        coefficient of 0 is off: its loss is a metric, and nothing is kept or differentiated for it.
        Only trained codes stay in the graph, since an overlapped reduction waits for every
        parameter. No communication.
        """
        if not (self.training and torch.is_grad_enabled()):
            return activation
        pulls_tokens = self.vq.vq_loss_coeff > 0 and self.vq.commitment_coeff > 0
        prepared, vectors = assignment.prepared, self.codebook.code_vectors()
        pulls_codes = vectors.requires_grad
        commitment, codebook = self.codebook.losses(
            prepared if pulls_tokens else prepared.detach(), vectors, assignment.codes
        )
        losses = torch.stack([commitment.detach(), codebook.detach(), torch.ones_like(commitment)])
        if pulls_tokens or pulls_codes:
            loss = self.vq.commitment_coeff * commitment
            if pulls_codes:
                loss = loss + codebook
            activation = self._attach_mean(activation, loss, self.vq.vq_loss_coeff)
        extra = self.codebook.extra_loss(prepared)
        if extra is not None:
            activation = self._attach_mean(activation, extra)
        return run_in_backward(activation, lambda: self._record(assignment, losses))

    def _attach_mean(
        self, activation: torch.Tensor, mean: torch.Tensor, coeff: float = 1.0
    ) -> torch.Tensor:
        """``activation`` carrying ``coeff`` times a mean over this rank's tokens."""
        num_parts = self.pg_collection.tp_cp.size()
        loss = mean * (coeff / num_parts)
        if self.config.calculate_per_token_loss:
            # Megatron then divides by the number of tokens of the global batch.
            loss = loss * (activation.shape[0] * num_parts)
        return MoEAuxLossAutoScaler.apply(activation, loss)

    def _record(self, assignment: Assignment, losses: torch.Tensor) -> None:
        self.step_losses += losses.to(self.step_losses.dtype)
        positions = self.candidates.offer(assignment.codes.shape[0], self.codebook.codes.device)
        self.codebook.record(assignment.prepared, assignment.codes, positions)

    def candidate_table(self) -> torch.Tensor:
        """fp32 ``[M, C, D]``, filled in this rank's slots; the sum over ranks is the table."""
        codebook = self.codebook
        shape = (codebook.num_slices, codebook.width)
        return self.candidates.table(codebook.step_candidates, shape, codebook.step_count)

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
        hold_frozen_codes(self.codebook)
        return scalars | _loss_scalars(losses), usage

    def scalars_of(self, parts: Iterator[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Code usage and VQ losses of the sums over replicas, fp32 scalars. Moves nothing."""
        losses, usage = next(parts), next(parts)
        for _ in range(2 if self.codebook.keeps_sums else 1):  # others' parts follow
            next(parts)
        return self.codebook.usage_scalars(usage) | _loss_scalars(losses)

    def clear_step(self) -> None:
        """Forget the step's losses, candidates and what the codebook recorded."""
        self.step_losses.zero_()
        self.candidates.clear()
        self.codebook.clear_step()


def _loss_scalars(losses: torch.Tensor) -> dict[str, torch.Tensor]:
    """Means over microbatches of summed ``[commitment, codebook loss, microbatches]``."""
    num_microbatches = losses[2].clamp(min=1.0)
    return {
        "commitment_loss": losses[0] / num_microbatches,
        "codebook_loss": losses[1] / num_microbatches,
    }
