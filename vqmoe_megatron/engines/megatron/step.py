"""One training step on Megatron's schedules, and the forward pass it shares with evaluation.

S sequence length, b micro batch size.

1. Forward and backward over all microbatches (``get_forward_backward_func``); inside it gradients
   are finalized and the codebooks' statistics are reduced.
2. All ranks agree on what the step saw: a non-finite loss or gradient, a stop request.
3. Codebooks and optimizer take their step, unless it is skipped; the schedule goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from vqmoe_megatron.engines.engine import StepResult
from vqmoe_megatron.moe.codebook_sync import CodebookSync
from vqmoe_megatron.tasks.task import Batch

Sums = torch.Tensor  # fp64 [num_sums]: summed loss in nats, number of scored tokens, a task's own
ForwardStep = Callable[[Iterator[Batch], torch.nn.Module], tuple[Any, Any]]  # of a Task


def run_microbatches(
    forward_step: ForwardStep,
    model: list[torch.nn.Module],
    iterators: list[Iterator[Batch]],
    num_microbatches: int,
    seq_length: int,
    micro_batch_size: int,
    forward_only: bool,
    num_sums: int = 2,
) -> Sums:
    """Run Megatron's schedule and return the loss sums of the global batch on every rank.

    Communicates: the schedule's own traffic, and as :func:`sum_reports`.
    """
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=model if len(model) > 1 else model[0],
        num_microbatches=num_microbatches,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )
    return sum_reports(reports, num_sums)


def sum_reports(reports: list[dict[str, Any]], num_sums: int = 2) -> Sums:
    """Add the losses of this rank's microbatches up over all ranks.

    Communicates: one all-reduce over the data- and context-parallel ranks and one broadcast from
    the last pipeline stage.
    """
    device = torch.cuda.current_device()
    sums = torch.zeros(num_sums, dtype=torch.float64, device=device)
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        sums = torch.stack([report["loss"] for report in reports]).sum(dim=0)
        replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(sums, group=replicas)
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        torch.distributed.broadcast(
            sums,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    return sums


class TrainStep:
    """Callable that advances the model by one step."""

    def __init__(
        self,
        forward_step: ForwardStep,
        model: list[torch.nn.Module],
        optimizer: Any,
        scheduler: Any,
        codebook_sync: CodebookSync,
        num_microbatches: int,
        seq_length: int,
        micro_batch_size: int,
        global_batch_size: int,
        num_sums: int = 2,
    ) -> None:
        self.forward_step = forward_step
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.codebook_sync = codebook_sync
        self.num_microbatches = num_microbatches
        self.seq_length = seq_length
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        self.num_sums = num_sums

    def __call__(
        self, iterators: list[Iterator[Batch]], stop_request: int, save_request: bool
    ) -> StepResult:
        """Take one step. The requests are this rank's; the result holds those of all ranks.

        Communicates over all groups of the layout, and once over the world (three integers).
        """
        started = time.perf_counter()
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = run_microbatches(
            self.forward_step,
            self.model,
            iterators,
            self.num_microbatches,
            self.seq_length,
            self.micro_batch_size,
            forward_only=False,
            num_sums=self.num_sums,
        )
        flags = torch.stack(
            [
                1 - (torch.isfinite(sums[0]) & self._gradients_are_finite()).int(),
                # Filled on the device: torch.tensor would copy the number from the host.
                torch.full((), stop_request, dtype=torch.int32, device=sums.device),
                torch.full((), save_request, dtype=torch.int32, device=sums.device),
            ]
        )
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        # The host synchronisation of the step: the loop must know whether it may go on.
        (bad, stop, save), (total, num_tokens, *_) = flags.tolist(), sums.tolist()
        learning_rate = self._learning_rate()
        grad_norm = float("nan")
        if bad:
            self.codebook_sync.discard(self.model)
        else:
            self.codebook_sync.apply()
            updated, norm, _ = self.optimizer.step()
            grad_norm = float(norm) if norm is not None else float("nan")
            bad = not updated
        # The schedule counts samples read, so a skipped step advances it too.
        self.scheduler.step(increment=self.global_batch_size)
        return StepResult(
            loss=total / max(num_tokens, 1.0),
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            skipped=bool(bad),
            stop_request=stop,
            save_requested=bool(save),
            core_seconds=time.perf_counter() - started,
        )

    def _learning_rate(self) -> float:
        """That of the groups without a rate of their own, as rows of a code memory have."""
        groups, usual = self.optimizer.param_groups, self.scheduler.max_lr
        return next(g["lr"] for g in groups if g.get("max_lr", usual) in (None, usual))

    def _gradients_are_finite(self) -> torch.Tensor:
        """Bool scalar over this rank's gradient buffers; no communication."""
        finite = torch.ones((), dtype=torch.bool, device=torch.cuda.current_device())
        for chunk in self.model:
            for buffer in chunk.buffers + chunk.expert_parallel_buffers:
                finite &= all_finite(buffer.grad_data)
        return finite


def all_finite(values: torch.Tensor) -> torch.Tensor:
    """Bool scalar: whether no element is NaN or infinite, of a tensor that may fill the device.

    The least and the largest element, NaN if any is, are found in one pass without a copy;
    ``isfinite`` of the tensor, or its ``abs()``, would need one.
    """
    least, largest = torch.aminmax(values)
    return torch.isfinite(least) & torch.isfinite(largest)
