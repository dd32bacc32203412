"""A training step of a world of any size, simulated here and compared with the plan.

No torch in this process: each call starts one that simulates the chosen ranks one after the other.
Every tensor is fake, so memory does not grow with the model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.config.recipe import save_recipe
from vqmoe_megatron.plan.layout import ParallelLayout, check_layout
from vqmoe_megatron.plan.shape import LayerShape
from vqmoe_megatron.plan.step_wire import step_wire
from vqmoe_megatron.plan.uncounted import uncounted
from vqmoe_megatron.plan.wire import Exact, StepWire, exact
from vqmoe_megatron.rundir.file_names import CONFIG_FILE
from vqmoe_megatron.runtime.exit_codes import end_in_words

JOB_FILE, RESULT_FILE = "job.json", "result.json"
MAX_RANKS = 4096
MICROBATCHES_PER_STAGE = 1  # simulated: a pipeline fills and drains
TIMEOUT_SECONDS = 1800
SHOWN_LINES = 20

ByCollective = dict[tuple[str, str], tuple[int, Exact]]  # (collective, axis) -> calls, bytes


class SimulationFailed(RuntimeError):
    """The simulating process ended badly; the message holds the end of its output."""


@dataclass(frozen=True)
class Comparison:
    """One collective over one axis, of one rank: (calls, bytes) as planned and as counted."""

    collective: str
    axis: str
    planned: tuple[int, Exact]
    counted: tuple[int, Exact]

    @property
    def is_equal(self) -> bool:
        """In calls and to the byte."""
        return self.planned == self.counted


@dataclass(frozen=True)
class SimulatedRank:
    """What one rank would send."""

    rank: int
    pipeline_rank: int
    num_parameters: int  # on this rank
    counted: ByCollective
    seconds: float

    @property
    def sent_bytes(self) -> Exact:
        """Of the whole step."""
        return exact(sum((Fraction(sent) for _, sent in self.counted.values()), Fraction(0)))


@dataclass(frozen=True)
class SimulatedStep:
    """Some ranks of a world, and the plan of the same step."""

    world_size: int
    num_microbatches: int  # simulated
    num_microbatches_of_run: int
    ranks: tuple[SimulatedRank, ...]
    planned: StepWire  # of the simulated microbatches
    seconds: float  # of the simulating process, its imports included
    cpu_seconds: float  # the same, as processor time: it does not depend on who else computes
    peak_memory_bytes: int  # of that process
    notes: tuple[str, ...]  # what the figures rest on

    def comparison(self, rank: SimulatedRank) -> list[Comparison]:
        """Plan against simulation of one rank, collective by collective."""
        return compare(self.planned.stages[rank.pipeline_rank].by_collective, rank.counted)

    @property
    def matches(self) -> bool:
        """Whether plan and simulation agree in every call and byte of every simulated rank."""
        return all(c.is_equal for rank in self.ranks for c in self.comparison(rank))


def compare(planned: ByCollective, counted: ByCollective) -> list[Comparison]:
    """Lay two tables side by side; what is missing in one is (0, 0) there."""
    return [
        Comparison(*key, planned.get(key, (0, 0)), counted.get(key, (0, 0)))
        for key in sorted({*planned, *counted})
    ]


def simulate_step(
    config: RunConfig,
    world_size: int,
    ranks: Sequence[int] | None = None,
    all_microbatches: bool = False,
) -> SimulatedStep:
    """Build the real model on a fake process group, take one step, count what it would send.

    Starts one process and waits for it; nothing global changes here, and nothing is sent.

    Args:
        config: with ``model.vocab_size`` set.
        world_size: at most 4,096.
        ranks: which to simulate; None: the first rank of every pipeline stage whose plan differs
            from those in front of it (in a long pipeline the first, one inner and the last stage).
        all_microbatches: simulate all of a step, not one per pipeline stage. Bytes per microbatch
            are the same; time is not.

    Raises:
        ValueError: for a layout, a world size or a rank that is not legal, and for so few tokens
            that their rows cannot be spread evenly.
        SimulationFailed: when the process ends badly.
    """
    if not 1 <= world_size <= MAX_RANKS:
        raise ValueError(
            f"1 <= world_size <= {MAX_RANKS} fails: {world_size}; simulate fewer ranks, or plan "
            "without a simulation, which knows no such limit"
        )
    layout = check_layout(config, world_size, "cpu")
    if reasons := [*uncounted(config, layout), *_other_than_planned(config)]:
        raise ValueError("; ".join(reasons))
    _check_rows(config, layout)
    num_of_run = layout.num_microbatches(config.train)
    simulated = config if all_microbatches else _shortened(config, layout)
    planned = step_wire(simulated, layout)
    chosen = list(_distinct_stages(planned, layout) if ranks is None else ranks)
    for rank in chosen:
        if not 0 <= rank < world_size:
            raise ValueError(f"0 <= rank < world_size fails: {rank} of {world_size}")
    result = _run_process(simulated, world_size, chosen)
    return SimulatedStep(
        world_size=world_size,
        num_microbatches=layout.num_microbatches(simulated.train),
        num_microbatches_of_run=num_of_run,
        ranks=tuple(_simulated_rank(found) for found in result["ranks"]),
        planned=planned,
        seconds=result["seconds"],
        cpu_seconds=result["cpu_seconds"],
        peak_memory_bytes=result["peak_memory_bytes"],
        notes=_notes(layout.num_microbatches(simulated.train), num_of_run),
    )


def _other_than_planned(config: RunConfig) -> Iterator[str]:
    """What a plan counts of another step than the first, which is the one simulated."""
    model = config.model
    settings = config.router.for_run(model.moe_router, model.num_moe_experts, 1)
    if model.moe_router == "smoe_dropout" and settings.min_topk != model.moe_router_topk:
        yield (
            f"model.moe_router=smoe_dropout with router.min_topk={settings.min_topk} < "
            f"moe_router_topk={model.moe_router_topk}: a plan counts the last step, with all of "
            "them, and a simulation takes the first; set them equal to compare"
        )


def _check_rows(config: RunConfig, layout: ParallelLayout) -> None:
    shape = LayerShape.from_config(config, layout)
    ranks = layout.expert_model_parallel_size
    for what, rows in (
        ("rows that travel forward", shape.num_travelling_rows),
        ("rows of codes", shape.num_discrete_rows),
    ):
        if rows % ranks:
            raise ValueError(
                f"a simulation spreads rows evenly, but {what} per microbatch and rank % EP != 0: "
                f"{rows} % {ranks} = {rows % ranks}; choose train.micro_batch_size and "
                "model.seq_length that divide"
            )


def _shortened(config: RunConfig, layout: ParallelLayout) -> RunConfig:
    train = config.train
    most = MICROBATCHES_PER_STAGE * layout.pipeline_model_parallel_size
    if layout.num_microbatches(config.train) <= most:
        return config
    batch = most * train.micro_batch_size * layout.data_parallel_size
    return replace(config, train=replace(train, global_batch_size=batch))


def _distinct_stages(planned: StepWire, layout: ParallelLayout) -> list[int]:
    per_stage = layout.world_size // layout.pipeline_model_parallel_size
    first = {stage.terms: stage.pipeline_rank for stage in reversed(planned.stages)}
    return sorted(stage * per_stage for stage in first.values())


def _notes(num_simulated: int, num_of_run: int) -> tuple[str, ...]:
    notes = [
        "rows are spread evenly over the experts' ranks: without data there is no other routing",
        "all tensors are fake: shapes and calls are real, values are not",
    ]
    if num_simulated < num_of_run:
        notes.append(f"{num_simulated} of {num_of_run} microbatches; the others send the same")
    return tuple(notes)


def _run_process(config: RunConfig, world_size: int, ranks: list[int]) -> dict:
    with tempfile.TemporaryDirectory(prefix="vqmoe_simulate_") as temporary:
        folder = Path(temporary)
        (folder / JOB_FILE).write_text(json.dumps({"world_size": world_size, "ranks": ranks}))
        save_recipe(config, folder / CONFIG_FILE)
        command = [sys.executable, "-m", "vqmoe_megatron.simulate.simulated_rank", str(folder)]
        output = folder / "output.txt"
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        with output.open("w") as stream:
            try:
                ended = subprocess.run(  # noqa: S603 (our own interpreter and module)
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    timeout=TIMEOUT_SECONDS,
                    env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
                )
            except subprocess.TimeoutExpired:
                raise SimulationFailed(
                    f"the simulation of {len(ranks)} of {world_size} ranks took more than "
                    f"{TIMEOUT_SECONDS} s"
                ) from None
        if ended.returncode != 0:
            lines = output.read_text(errors="replace").splitlines()[-SHOWN_LINES:]
            how = end_in_words(ended.returncode)
            raise SimulationFailed(
                "\n".join([f"the simulation of {len(ranks)} of {world_size} ranks {how}", *lines])
            )
        return json.loads((folder / RESULT_FILE).read_text())


def _simulated_rank(found: dict) -> SimulatedRank:
    return SimulatedRank(
        rank=found["rank"],
        pipeline_rank=found["pipeline_rank"],
        num_parameters=found["num_parameters"],
        counted={
            (collective, axis): (calls, exact(Fraction(numerator, denominator)))
            for collective, axis, calls, numerator, denominator in found["counted"]
        },
        seconds=found["seconds"],
    )
