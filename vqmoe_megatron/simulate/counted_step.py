"""Training steps on real ranks, counted: what each rank really sends, step by step.

R rows of a dispatch, P expert-parallel ranks. The steps are those of the trainer, on batches of
the caller's; only the routing can be replaced (``balanced_routing``), to have the balance that a
plan assumes. With the routing of the model the count comes with the rows that travelled, from which
the plan's formulas give the same bytes again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.moe import code_space, layer
from vqmoe_megatron.moe.dispatch import DispatchReceipt
from vqmoe_megatron.plan.exact import Exact, exact
from vqmoe_megatron.plan.layer_wire import MeanTraffic
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.plan.wire_cost import RowTraffic
from vqmoe_megatron.runtime.collective_counter import CollectiveCounter, process_group_axes
from vqmoe_megatron.simulate.balanced_routing import balanced_routing
from vqmoe_megatron.training.batches import Batch
from vqmoe_megatron.training.step_builder import build_step

ByCollective = dict[tuple[str, str], tuple[int, Exact]]  # (collective, axis) -> calls, bytes


@dataclass(frozen=True)
class CountedStep:
    """One step of one rank."""

    loss: float  # nats per token, over the global batch
    counted: ByCollective
    traffic: MeanTraffic | None  # None: no rows travelled


@dataclass
class _Rows:
    """Rows that dispatches moved: sent to others, received from others, largest gathered block."""

    sums: list[int] = field(default_factory=lambda: [0, 0, 0])
    num_dispatches: int = 0

    def add(self, receipt: DispatchReceipt, num_rows: int) -> None:
        rank = parallel_state.get_expert_model_parallel_rank()
        sent = received = 0
        largest = num_rows
        if receipt.input_splits:
            sent = num_rows - receipt.input_splits[rank]
            largest = sum(receipt.output_splits)
            received = largest - receipt.output_splits[rank]
        if receipt.gathered_sizes:
            largest = max(receipt.gathered_sizes)
        self.sums = [a + b for a, b in zip(self.sums, (sent, received, largest), strict=True)]
        self.num_dispatches += 1

    @property
    def mean(self) -> RowTraffic | None:
        if not self.num_dispatches:
            return None
        return RowTraffic(*(exact(Fraction(s, self.num_dispatches)) for s in self.sums))


def count_steps(
    config: RunConfig,
    layout: ParallelLayout,
    batches: Callable[[], Iterator[Batch]],
    num_steps: int,
    is_balanced: bool,
) -> list[CountedStep]:
    """Build the model and take ``num_steps`` steps after a first one that is not counted (a
    codebook meets its first tokens there). Call on every rank of a world with its process groups.

    Args:
        config: with ``model.vocab_size`` set.
        layout: of the process groups.
        batches: called once per model chunk; chunks read the same microbatches.
        num_steps: to count.
        is_balanced: replace the routing by the balance that a plan assumes.

    Communicates as training does.
    """
    parts = build_step(config, layout)
    for chunk in parts.model:
        chunk.train()
    iterators = [batches() for _ in parts.model]
    found = []
    with ExitStack() as stack:
        if is_balanced:
            stack.enter_context(balanced_routing())
        parts.step(iterators, 0, False)
        for _ in range(num_steps):
            counter = CollectiveCounter(process_group_axes())
            with _recorded_rows() as (forward, backward), counter:
                result = parts.step(iterators, 0, False)
            traffic = forward.mean or backward.mean
            found.append(
                CountedStep(
                    result.loss,
                    {key: (calls, exact(sent)) for key, (calls, sent) in counter.counted.items()},
                    # Where a path sends nothing its formula asks for no traffic.
                    traffic and MeanTraffic(forward.mean or traffic, backward.mean),
                )
            )
    return found


@contextmanager
def _recorded_rows() -> Iterator[tuple[_Rows, _Rows]]:
    """Write down the receipts of rows that travel forward, and of code space's gradient rows."""
    forward, backward = _Rows(), _Rows()

    def recording(real: Callable[..., Any], rows: _Rows) -> Callable[..., Any]:
        def dispatch(sent: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            arrived, receipt = real(sent, *args, **kwargs)
            rows.add(receipt, sent.shape[0])
            return arrived, receipt

        return dispatch

    with (
        mock.patch.object(layer, "dispatch", recording(layer.dispatch, forward)),
        mock.patch.object(code_space, "dispatch", recording(code_space.dispatch, backward)),
    ):
        yield forward, backward
