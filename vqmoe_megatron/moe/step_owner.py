"""What ends once per optimizer step: the interface of everything that keeps sums over a step.

N experts, C code slices, K codes per slice.

1. In every microbatch's backward pass an owner adds to its sums and calls ``recorded``.
2. ``finish_table``: before gradients are reduced, what it kept for the step is differentiated.
3. ``gather``: what it needs of other ranks that is no sum. ``local_parts``: its sums, which are
   added up over its replicas in place; ``sums`` then holds the result, until the step is cleared.
4. ``apply_parts`` moves it by the reduced sums, or ``clear_step`` forgets them.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from vqmoe_megatron.moe.step_statistics import KeepsStatistics


@dataclass(frozen=True)
class LayerStatistics:
    """One layer's reduced view of a step; equal on all replicas."""

    layer_number: int | None  # 1-based, over all pipeline stages; None outside a model
    scalars: dict[str, torch.Tensor]  # fp32 scalars by metric name, without prefix
    expert_load: torch.Tensor | None  # fp32 [N] rows per expert; None for a bare VQRouter
    code_usage: torch.Tensor | None  # fp32 [C, K] tokens per code; None without a codebook
    row_reads: torch.Tensor | None = None  # fp32 [A, M] of a code memory, by address and row


@dataclass(frozen=True)
class StepSums:
    """An owner's sums over its replicas, waiting for the optimizer's step."""

    parts: list[torch.Tensor]  # as ``local_parts`` gives them
    num_microbatches: int  # recorded by this rank
    chunks: tuple[weakref.ref, ...]  # of the model, which says whose optimizer is waited for


class StepOwner(KeepsStatistics):
    """A module whose codebook, table or counters belong to one optimizer step."""

    num_recorded_microbatches = 0  # since the last end of a step
    sums: StepSums | None = None
    has_ended_a_step = False  # its sums were applied once, so the loop is known to end its steps
    on_every_stage = False  # whether every pipeline stage holds such owners

    def recorded(self) -> None:
        """One more microbatch was differentiated; called from its backward pass."""
        self.num_recorded_microbatches += 1

    @property
    def keeps_table(self) -> bool:
        """Whether something is kept for the whole step and differentiated at its end."""
        return False

    def finish_table(self) -> None:
        """Bring what a kept table collected to the weights, before gradients are reduced."""

    def refuse_unfinished_table(self) -> None:
        """Raise ``ValueError`` where the optimizer would step without a kept table's gradient."""

    def refuse_foreign_optimizer(self) -> None:
        """Raise ``ValueError`` for what Megatron's optimizers cannot hold unless told how."""

    @property
    @abstractmethod
    def replica_group(self) -> torch.distributed.ProcessGroup:
        """``tp_dp_cp``: the ranks that hold a replica and saw different tokens."""

    def gather(self) -> None:
        """Bring together what the step's end needs besides the sums, and keep it for that.

        Communicates where an owner says so; called on all ranks together, before the sums."""

    @abstractmethod
    def local_parts(self) -> list[torch.Tensor]:
        """This rank's fp32 sums, in the order in which :meth:`apply_parts` takes them: contiguous,
        and nobody else's, because they are reduced in place."""

    @abstractmethod
    def scalars_of(self, parts: Iterator[torch.Tensor]) -> dict[str, torch.Tensor]:
        """What reduced sums say by themselves: fp32 scalars by metric name. Moves nothing."""

    @abstractmethod
    def apply_parts(self, reduced: Iterator[torch.Tensor]) -> tuple[dict, ...]:
        """Move by the reduced sums; return scalars, expert load and code usage, as copies."""

    def row_reads(self) -> torch.Tensor | None:
        """Reads of a code memory's rows fp32 ``[A, M]`` that the step's reduced sums hold, a copy;
        None where none are counted."""
        return None

    def _load_from_state_dict(self, *args, **kwargs) -> None:  # noqa: ANN002, ANN003
        super()._load_from_state_dict(*args, **kwargs)
        self.clear_step()  # of the weights that were

    def clear_step(self) -> None:
        """Forget the step. No communication."""
        self.num_recorded_microbatches = 0
        self.sums = None

    def apply_sums(self) -> LayerStatistics:
        """Take the step that ``sums`` describe, and clear it. No communication."""
        scalars, load, usage = self.apply_parts(iter(self.sums.parts))
        reads = self.row_reads()
        self.clear_step()
        self.has_ended_a_step = True
        return LayerStatistics(self.layer_number, scalars, load, usage, reads)


def step_owners(model: list[torch.nn.Module]) -> list[StepOwner]:
    """The owners in these model chunks, in the order of their modules."""
    return [m for chunk in model for m in chunk.modules() if isinstance(m, StepOwner)]
