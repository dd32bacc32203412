"""Which layouts of a world are best for a recipe: all legal ones, ranked by predicted step time.

Tried: every TP, PP, VPP, EP and ETP that tile the world, with and without the distributed
optimizer, and micro batches of 1, 2, 4, 8, 16 and the recipe's own. TP and ETP stay within a node,
VPP is none, 2 or 4; the recipe's own layout is tried in any case. Dropped, each with its reason:
what a rule of the layout forbids, and what does not fit the device's memory. Not tried: what does
not tile the world, and a distributed optimizer without replicas to share it. Everything else, the
global batch too, stays the recipe's.

Candidates are judged by the first and the last pipeline stage; the best are then planned whole. One
whose kernels and bubble alone take longer than the ten best so far, and than the recipe's own
layout, is not looked at further.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.plan.flops import run_flops
from vqmoe_megatron.plan.hardware import Hardware
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.plan.memory import stage_memory
from vqmoe_megatron.plan.run_plan import RunPlan, layout_json, plan_run, step_time_json
from vqmoe_megatron.plan.state_memory import StateBytes, state_bytes
from vqmoe_megatron.plan.step_time import least_seconds, step_time
from vqmoe_megatron.plan.uncounted import counted_layout_errors

VIRTUAL_SIZES = (None, 2, 4)
MOST_MICRO_BATCH = 16
MEMORY_REASON = "more memory than the device has"


@dataclass(frozen=True)
class SearchResult:
    """The layouts that can run, best first, and why the others cannot."""

    best: tuple[RunPlan, ...]
    own: RunPlan  # the recipe as it is
    own_rank: int | None  # 1: ``own`` is ``best[0]``; beyond ``best``: behind all that are faster
    num_tried: int
    num_fitting: int
    dropped: dict[str, int]  # candidates by reason; one that breaks several counts for its first
    smallest_peak_bytes: int | None  # of those that do not fit


def search_layouts(
    config: RunConfig, world_size: int, hardware: Hardware, num_best: int = 10
) -> SearchResult:
    """Try the layouts of ``world_size`` ranks.

    Raises:
        ValueError: for an unknown vocabulary size, or fewer than one rank.
    """
    if world_size < 1:
        raise ValueError(f"world_size={world_size} must be at least 1")
    own = plan_run(config, world_size, hardware)
    own_seconds = _judged_seconds(own) if not own.errors and own.fits else 0.0
    num_faster = 0  # than the recipe's own layout
    dropped: Counter[str] = Counter()
    fitting: list[tuple[float, int, RunConfig]] = []  # seconds, order of trial
    num_tried = num_fitting = 0
    smallest: int | None = None
    place: tuple[ParallelLayout, bool] | None = None
    is_too_full = False
    states: dict[int, StateBytes] = {}
    was_tried = bool(own.errors)

    def candidates() -> Iterator[RunConfig]:
        yield from _candidates(config, world_size, hardware)
        if not was_tried:
            yield config

    for candidate in candidates():
        num_tried += 1
        if errors := counted_layout_errors(candidate, world_size, hardware.device):
            dropped[_reason(errors[0])] += 1
            continue
        layout = ParallelLayout.from_config(candidate, world_size)
        was_tried = was_tried or _is_same(candidate, layout, own)
        if place != (layout, candidate.optimizer.use_distributed_optimizer):
            place = (layout, candidate.optimizer.use_distributed_optimizer)
            ends = sorted({0, layout.pipeline_model_parallel_size - 1})
            states = {end: state_bytes(candidate, layout, end) for end in ends}
            is_too_full = False
        if is_too_full:  # micro batches come in ascending order
            dropped[MEMORY_REASON] += 1
            continue
        memory = tuple(
            stage_memory(candidate, layout, end, hardware.kernels, state)
            for end, state in states.items()
        )
        peak = max(stage.peak for stage in memory)
        if peak > hardware.memory_bytes:
            dropped[MEMORY_REASON] += 1
            is_too_full = True
            smallest = peak if smallest is None else min(smallest, peak)
            continue
        num_fitting += 1
        slowest_of_interest = max(own_seconds, fitting[-1][0] if fitting else 0.0)
        if len(fitting) == num_best and slowest_of_interest <= least_seconds(
            candidate, layout, hardware
        ):
            continue
        flops = run_flops(candidate, layout)
        seconds = step_time(candidate, layout, flops, memory, hardware).total_seconds
        num_faster += seconds < own_seconds
        fitting = sorted([*fitting, (seconds, num_tried, candidate)], key=lambda e: e[:2])
        fitting = fitting[:num_best]
    best = tuple(plan_run(entry[2], world_size, hardware) for entry in fitting)
    places = [
        place
        for place, plan in enumerate(best, start=1)
        if not own.errors and _is_same(plan.config, plan.layout, own)
    ]
    behind = max(num_faster, len(best)) + 1 if own_seconds else None
    return SearchResult(
        best=best,
        own=own,
        own_rank=places[0] if places else behind,
        num_tried=num_tried,
        num_fitting=num_fitting,
        dropped=dict(dropped.most_common()),
        smallest_peak_bytes=smallest,
    )


def _judged_seconds(plan: RunPlan) -> float:
    """The step time by which candidates are ranked: that of the first and the last stage."""
    ends = sorted({0, plan.layout.pipeline_model_parallel_size - 1})
    memory = tuple(plan.figures.memory[end] for end in ends)
    flops = plan.figures.flops
    return step_time(plan.config, plan.layout, flops, memory, plan.hardware).total_seconds


def _is_same(candidate: RunConfig, layout: ParallelLayout, own: RunPlan) -> bool:
    """Whether a candidate is the recipe as it is, however the recipe writes its defaults."""
    mine, own_settings = ((c.optimizer, c.train) for c in (candidate, own.config))
    return layout == own.layout and mine == own_settings


def _candidates(config: RunConfig, world_size: int, hardware: Hardware) -> Iterator[RunConfig]:
    """Recipes with every layout that tiles the world."""
    near = [size for size in _divisors(world_size) if size <= hardware.devices_per_node]
    for tensor, stages in product(near, _divisors(world_size)):
        if world_size % (tensor * stages) or stages > config.model.num_layers:
            continue
        replicas = world_size // (tensor * stages)
        per_stage = world_size // stages
        for shards, experts in product(near, _divisors(per_stage)):
            if per_stage % (shards * experts) or experts > config.model.num_moe_experts:
                continue
            shared_by = max(replicas, per_stage // (shards * experts))
            for virtual, is_distributed, micro in product(
                VIRTUAL_SIZES if stages > 1 else VIRTUAL_SIZES[:1],
                (False, True) if shared_by > 1 else (config.optimizer.use_distributed_optimizer,),
                _micro_batches(config, replicas),
            ):
                yield _with_layout(
                    config, (tensor, stages, virtual, experts, shards), is_distributed, micro
                )


def _with_layout(
    config: RunConfig,
    sizes: tuple[int, int, int | None, int, int],
    is_distributed: bool,
    micro_batch_size: int,
) -> RunConfig:
    tensor, stages, virtual, experts, shards = sizes
    overlaps = config.optimizer.overlap_param_gather and is_distributed
    return replace(
        config,
        parallel=replace(
            config.parallel,
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=stages,
            virtual_pipeline_model_parallel_size=virtual,
            expert_model_parallel_size=experts,
            expert_tensor_parallel_size=shards,
            sequence_parallel=None,
        ),
        optimizer=replace(
            config.optimizer,
            use_distributed_optimizer=is_distributed,
            overlap_param_gather=overlaps,
        ),
        train=replace(config.train, micro_batch_size=micro_batch_size),
    )


def _micro_batches(config: RunConfig, replicas: int) -> list[int]:
    """Powers of two that leave every replica a microbatch, and the recipe's own."""
    most = min(MOST_MICRO_BATCH, max(1, config.train.global_batch_size // replicas))
    powers = {2**power for power in range(most.bit_length())}
    return sorted(powers | {config.train.micro_batch_size})


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _reason(error: str) -> str:
    """The rule without its numbers: ``num_layers % (PP * VPP)`` of an equation, else the head of
    the sentence."""
    equation = re.match(r"(.*?) != 0:", error)
    if equation:
        return re.sub(r" = [\d *]+\)", ")", equation.group(1))
    return re.sub(r" *= *\d+", "", error.split(":")[0].split(";")[0])


def search_json(result: SearchResult) -> dict[str, Any]:
    """Return a search: the best layouts and the recipe's own, and counts of the others."""
    own = result.own
    return {
        "num_tried": result.num_tried,
        "num_fitting": result.num_fitting,
        "dropped": result.dropped,
        "smallest_peak_bytes": result.smallest_peak_bytes,
        "best": [_found_json(plan) for plan in result.best],
        "recipe": {
            "rank": result.own_rank,
            **({"errors": list(own.errors)} if own.errors else _found_json(own)),
        },
    }


def _found_json(plan: RunPlan) -> dict[str, Any]:
    return {
        "layout": layout_json(plan.layout),
        "micro_batch_size": plan.config.train.micro_batch_size,
        "use_distributed_optimizer": plan.config.optimizer.use_distributed_optimizer,
        "memory_bytes": plan.memory_bytes,
        "wire_bytes_per_step": plan.wire_bytes_per_step,
        "step_time": step_time_json(plan.step_time),
    }
