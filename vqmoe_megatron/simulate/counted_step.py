"""Training steps on real ranks, counted: what each rank really sends, step by step.

R rows of a dispatch, P expert-parallel ranks. The steps are those of the trainer, on batches of
the caller's; only the expert engine, and the planner of a code memory's rows, are others, which
count rows, and can send them with the balance that a plan assumes. With the routing of the model
the count comes with the rows that travelled, from which the plan's formulas give the same bytes
again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial

from megatron.core import parallel_state

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.engines.megatron.engine import MegatronEngine
from vqmoe_megatron.moe.dispatch import DispatchReceipt
from vqmoe_megatron.plan.chunk_wire import MeanTraffic
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.plan.memory_shape import RowReads
from vqmoe_megatron.plan.wire import Exact, RowTraffic, exact
from vqmoe_megatron.runtime.collective_counter import CollectiveCounter, process_group_axes
from vqmoe_megatron.simulate.engines import BalancedCountedEngine, CountedEngine
from vqmoe_megatron.simulate.row_planners import (
    BalancedCountedPlanner,
    CountedPlanner,
    use_planner,
)
from vqmoe_megatron.tasks.pretrain import Pretrain
from vqmoe_megatron.tasks.task import Batch

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
    def mean(self) -> RowTraffic:
        return RowTraffic(*(exact(Fraction(s, self.num_dispatches)) for s in self.sums))


@dataclass
class _Reads:
    """Rows of a code memory in the plans of a step: wanted of others, asked by others."""

    sums: list[int] = field(default_factory=lambda: [0, 0])
    num_plans: int = 0

    def add(self, wanted: list[int], asked: list[int]) -> None:
        group = parallel_state.get_expert_tensor_and_model_parallel_group()
        for place, rows in enumerate((wanted, asked)):
            self.sums[place] += sum(rows) - rows[group.rank()]
        self.num_plans += 1

    @property
    def mean(self) -> RowReads | None:
        if not self.num_plans:
            return None
        return RowReads(*(exact(Fraction(s, self.num_plans)) for s in self.sums))


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
    rows: dict[str, _Rows] = {}
    reads = _Reads()

    def record(direction: str, receipt: DispatchReceipt, num_rows: int) -> None:
        rows.setdefault(direction, _Rows()).add(receipt, num_rows)

    engine = BalancedCountedEngine if is_balanced else CountedEngine
    task = Pretrain(config, corpus=None)  # its loss; batches are the caller's
    parts = MegatronEngine.build(config, layout, task, partial(engine, record))
    planner = BalancedCountedPlanner if is_balanced else CountedPlanner
    use_planner(parts.model, planner(lambda wanted, asked: reads.add(wanted, asked)))
    for chunk in parts.model:
        chunk.train()
    iterators = [batches() for _ in parts.model]
    found = []
    parts.step(iterators, 0, False)
    for _ in range(num_steps):
        rows.clear()
        reads = _Reads()
        with CollectiveCounter(process_group_axes()) as counter:
            result = parts.step(iterators, 0, False)
        counted = {key: (calls, exact(sent)) for key, (calls, sent) in counter.counted.items()}
        found.append(CountedStep(result.loss, counted, _traffic(rows, reads.mean)))
    return found


def _traffic(rows: dict[str, _Rows], reads: RowReads | None) -> MeanTraffic | None:
    """Mean rows of a step's dispatches in both directions, and of a code memory."""
    means = {direction: of.mean for direction, of in rows.items()}
    if not means and reads is None:
        return None
    # Where a path sends nothing forward its formula asks for no traffic there.
    backward = means.get("backward")
    return MeanTraffic(means.get("forward", backward), backward, reads)
