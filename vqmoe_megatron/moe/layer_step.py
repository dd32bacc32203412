"""What of a VQMoE layer ends once per optimizer step: its kept table, its loads, its codebook.

N experts, C code slices, K codes per slice.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vqmoe_megatron.moe.paths import Path
from vqmoe_megatron.moe.step_owner import StepOwner


class LayerStep(StepOwner):
    """The part of :class:`VQMoELayer` that its step's end talks to."""

    step_expert_load: torch.Tensor  # fp32 [N], this step's rows per expert, both paths
    step_gate: torch.Tensor  # fp32 [2]: sum over tokens of the discrete weight, tokens
    paths: list[Path]

    @property
    def replica_group(self) -> torch.distributed.ProcessGroup:
        """``tp_dp_cp``."""
        return self.pg_collection.tp_dp_cp

    @property
    def keeps_table(self) -> bool:
        """``vq.table_per_step``."""
        return any(path.keeps_table for path in self.paths)

    def finish_table(self) -> None:
        """Differentiate the step's table; communicates as :meth:`StepTable.finish_table`."""
        for path in self.paths:
            path.finish_table()

    def refuse_unfinished_table(self) -> None:
        """Raise ``ValueError`` where a table's gradient would come after the optimizer's step."""
        for path in self.paths:
            path.refuse_unfinished_table()

    def refuse_foreign_optimizer(self) -> None:
        """Raise ``ValueError`` for trained codes among weights of half precision."""
        for path in self.paths:
            path.refuse_foreign_optimizer(self.config)

    def local_parts(self) -> list[torch.Tensor]:
        """Expert load ``[N]``, gate sums ``[2]`` and what the paths summed."""
        of_paths = [part for path in self.paths for part in path.local_parts()]
        return [self.step_expert_load, self.step_gate, *of_paths]

    def scalars_of(self, parts: Iterator[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Expert load, combine weight, and the paths' code usage and losses."""
        scalars = _routing_scalars(next(parts), next(parts))
        for path in self.paths:
            scalars = path.scalars_of(parts) | scalars
        return scalars

    def apply_parts(self, reduced: Iterator[torch.Tensor]) -> tuple[dict, ...]:
        """Move the codebooks; return scalars, load ``[N]`` and usage ``[C, K]``.

        Of several codebooks the first one's are shown; without one usage is None.
        """
        load, gate = next(reduced), next(reduced)
        scalars, usages = _routing_scalars(load, gate), []
        for path in self.paths:
            of_path, usage = path.apply_parts(reduced)
            scalars = of_path | scalars
            usages += usage
        return scalars, load.clone(), next(iter(usages), None)

    def row_reads(self) -> torch.Tensor | None:
        """Of the path that counts them, a memory by codes of hidden states."""
        found = (path.row_reads() for path in self.paths)
        return next((reads for reads in found if reads is not None), None)

    def clear_step(self) -> None:
        """Forget the step: loads, and what the paths kept and recorded."""
        super().clear_step()
        self.step_expert_load.zero_()
        self.step_gate.zero_()
        for path in self.paths:
            path.clear_step()


def _routing_scalars(load: torch.Tensor, gate: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of rows per expert ``[N]`` and ``[sum of discrete weights, tokens]``: fp32 scalars."""
    return {
        "expert_load_imbalance": load.max() / load.mean().clamp(min=1e-12),
        "combine_discrete_weight": gate[0] / gate[1].clamp(min=1.0),
    }
