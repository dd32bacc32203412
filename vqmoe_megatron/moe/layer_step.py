"""What of a VQMoE layer ends once per optimizer step: its kept table, its loads, its codebook.

N experts, C code slices, K codes per slice.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vqmoe_megatron.moe.megatron_settings import refuse_trained_codes_in_half
from vqmoe_megatron.moe.step_owner import StepOwner


class LayerStep(StepOwner):
    """The part of :class:`VQMoELayer` that its step's end talks to."""

    step_expert_load: torch.Tensor  # fp32 [N], this step's rows per expert, both paths
    step_gate: torch.Tensor  # fp32 [2]: sum over tokens of the discrete weight, tokens

    @property
    def replica_group(self) -> torch.distributed.ProcessGroup:
        """``tp_dp_cp``."""
        return self.pg_collection.tp_dp_cp

    @property
    def keeps_table(self) -> bool:
        """``vq.table_per_step``."""
        return self.step_table is not None

    def finish_table(self) -> None:
        """Differentiate the step's table; communicates as :meth:`StepTable.backward`."""
        if self.keeps_table:
            self.step_table.backward()

    def refuse_unfinished_table(self) -> None:
        """Raise ``ValueError`` where a table's gradient would come after the optimizer's step."""
        if self.keeps_table:
            self.step_table.refuse_unfinished()

    def refuse_foreign_optimizer(self) -> None:
        """Raise ``ValueError`` for trained codes among weights of half precision."""
        if self.assigner is not None:
            refuse_trained_codes_in_half(self.config, self.assigner.codebook.codes)

    def local_parts(self) -> list[torch.Tensor]:
        """Expert load ``[N]``, gate sums ``[2]`` and what the assigner summed."""
        of_codes = [] if self.assigner is None else self.assigner.local_parts()
        return [self.step_expert_load, self.step_gate, *of_codes]

    def scalars_of(self, parts: Iterator[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Expert load, combine weight, and the assigner's code usage and losses."""
        scalars = _routing_scalars(next(parts), next(parts))
        return scalars if self.assigner is None else scalars | self.assigner.scalars_of(parts)

    def apply_parts(self, reduced: Iterator[torch.Tensor]) -> tuple[dict, ...]:
        """Move the codebook; return scalars, load ``[N]`` and usage ``[C, K]``."""
        load, gate = next(reduced), next(reduced)
        scalars = _routing_scalars(load, gate)
        if self.assigner is None:
            return scalars, load, None
        of_codes, usage = self.assigner.apply_parts(reduced)
        return scalars | of_codes, load, usage

    def clear_step(self) -> None:
        """Forget the step: table, loads, and what the assigner recorded."""
        super().clear_step()
        self.step_expert_load.zero_()
        self.step_gate.zero_()
        if self.step_table is not None:
            self.step_table.clear()
        if self.assigner is not None:
            self.assigner.clear_step()


def _routing_scalars(load: torch.Tensor, gate: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of rows per expert ``[N]`` and ``[sum of discrete weights, tokens]``: fp32 scalars."""
    return {
        "expert_load_imbalance": load.max() / load.mean().clamp(min=1e-12),
        "combine_discrete_weight": gate[0] / gate[1].clamp(min=1.0),
    }
