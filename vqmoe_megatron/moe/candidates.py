"""Tokens that a step offers to replace dead codes: the same ones however a batch is cut.

M candidates, T local tokens of a microbatch, P ranks with parts of one sequence (tensor- and
context-parallel), T P = T_full.

The table is filled by the microbatches of the global batch in their order, which is that of
data-parallel ranks within that of microbatches: the same samples at every data-parallel size.
Microbatch g fills the slots from g T_full on, n of them, as many as are left; its slot j is the
token at position j T_full // n of the full sequence order. Most often the first fills all slots.
Where lengths vary it is the only one, since two microbatches must not fill the same slot.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from vqmoe_megatron.moe.context_cut import own_spans
from vqmoe_megatron.plan.codebook_bytes import MAX_CANDIDATES


class Candidates:
    """One codebook's offers of one step. ``num_slots`` is M."""

    def __init__(
        self, num_codes: int, pg_collection: ProcessGroupCollection, lengths_vary: bool
    ) -> None:
        self.num_slots = min(num_codes, MAX_CANDIDATES)
        self.pg_collection, self.lengths_vary = pg_collection, lengths_vary
        self.clear()

    def clear(self) -> None:
        """Forget the step."""
        self._slots: torch.Tensor | None = None  # that this rank fills
        self._num_microbatches = 0  # of this rank

    def offer(self, num_local_tokens: int, device: torch.device) -> torch.Tensor | None:
        """Positions int64 of this rank's next microbatch that are offered; None: none are."""
        found = self.places(num_local_tokens, self._num_microbatches, device)
        self._num_microbatches += 1
        if found is None:
            return None
        slots, positions = found
        self._slots = slots if self._slots is None else torch.cat([self._slots, slots])
        return positions

    def places(
        self, num_local_tokens: int, number: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Slots that this rank fills from its ``number``-th microbatch of the step, and its token
        positions, int64 each; None where it fills none.

        Positions from p on are offered in the slots from p n / T_full, rounded up, on.
        """
        groups = self.pg_collection
        replicas, num_parts = groups.tp_dp_cp, groups.tp.size() * groups.cp.size()
        microbatch = number * (replicas.size() // num_parts) + replicas.rank() // num_parts
        num_tokens = num_local_tokens * num_parts
        num_offered = min(num_tokens, self.num_slots - microbatch * num_tokens)
        if num_offered <= 0 or (microbatch > 0 and self.lengths_vary):
            return None
        slots, positions = [], []
        for span in own_spans(num_local_tokens, groups.tp, groups.cp):
            ends = (
                -(-place * num_offered // num_tokens)
                for place in (span.first, span.first + span.length)
            )
            of_span = torch.arange(*ends, device=device)
            slots.append(of_span)
            positions.append(of_span * num_tokens // num_offered - span.first + span.place)
        return torch.cat(slots) + microbatch * num_tokens, torch.cat(positions)

    def table(
        self, found: torch.Tensor | None, token_shape: tuple[int, int], like: torch.Tensor
    ) -> torch.Tensor:
        """``[M, C, D]`` for tokens of ``token_shape`` (C, D), in dtype and on the device of
        ``like``, filled in this rank's slots with what was ``found`` for them (None: nothing); the
        sum over ranks is the table, with zeros where the step had too few tokens."""
        slots = self._slots
        if found is not None and slots is not None and slots.numel() == self.num_slots:
            return found
        table = like.new_zeros(self.num_slots, *token_shape)
        if found is not None:
            table[slots] = found
        return table
