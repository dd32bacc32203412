"""A plan as one JSON object: the contract of ``vqmoe plan --json``.

Always there: ``world_size``, ``hardware``, ``rank_grid``, ``parameters``, ``memory_bytes``,
``flops_per_step``, ``wire_bytes_per_step``, ``step_time``, ``errors``, ``assumptions``,
``excluded``. With errors the figures are null and ``rank_grid`` is empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from vqmoe_megatron.plan.code_owners import code_owners
from vqmoe_megatron.plan.exact import Exact
from vqmoe_megatron.plan.hardware import Hardware
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.plan.layout_search import SearchResult
from vqmoe_megatron.plan.rank_grid import rank_grid
from vqmoe_megatron.plan.rank_groups import rank_groups
from vqmoe_megatron.plan.run_memory import EXCLUDED
from vqmoe_megatron.plan.run_plan import RunPlan
from vqmoe_megatron.plan.step_time import StepTime

NOT_MEASURED = (
    "hardware figures are assumptions from data sheets; no GPU figure was measured by this project"
)


def plan_json(plan: RunPlan, assumptions: Sequence[str] = ()) -> dict[str, Any]:
    """Return the plan as plain values; bytes are ints, or floats where no whole number."""
    described: dict[str, Any] = {
        "world_size": plan.world_size,
        "config": asdict(plan.config),
        "hardware": hardware_json(plan.hardware),
        "errors": list(plan.errors),
        "assumptions": [NOT_MEASURED, *assumptions],
        "excluded": list(EXCLUDED),
        "layout": None,
        "rank_grid": [],
        "groups": None,
        "owners": None,
        "parameters": None,
        "memory_bytes": None,
        "flops_per_step": None,
        "wire_bytes_per_step": None,
        "step_time": None,
    }
    if plan.errors:
        return described
    figures = plan.figures
    described["assumptions"] += figures.wire.assumptions
    return described | {
        "layout": layout_json(figures.layout),
        "rank_grid": [asdict(place) for place in rank_grid(figures.layout)],
        "groups": [asdict(group) for group in rank_groups(figures.layout, plan.hardware)],
        "owners": [asdict(owner) for owner in code_owners(plan.config, figures.layout)],
        "parameters": {
            "total": figures.parameters.total,
            "active": figures.parameters.active,
            "total_by_part": figures.parameters.total_by_part,
            "active_by_part": figures.parameters.active_by_part,
            "per_rank": list(figures.parameters.per_rank),
            "per_rank_by_part": list(figures.parameters.per_rank_by_part),
        },
        "memory_bytes": {
            "peak": plan.memory_bytes,
            "device": plan.hardware.memory_bytes,
            "fits": plan.fits,
            "stages": [stage.by_part() for stage in figures.memory],
        },
        "flops_per_step": {
            "total": plan.flops_per_step,
            "forward": figures.flops.all_ranks.forward,
            "backward": figures.flops.all_ranks.backward,
            "recompute": figures.flops.all_ranks.recompute,
            "by_part": figures.flops.by_part,
            "per_rank": [of_rank.total for of_rank in figures.flops.per_rank],
            "per_token": figures.flops.per_token,
            "tokens_per_step": figures.flops.num_tokens,
        },
        "wire_bytes_per_step": {
            "total": number(figures.wire.sent_bytes),
            "by_axis": {axis: number(sent) for axis, sent in figures.wire.by_axis.items()},
            "stages": [
                [{**asdict(term), "sent_bytes": number(term.sent_bytes)} for term in stage.terms]
                for stage in figures.wire.stages
            ],
        },
        "step_time": step_time_json(figures.step_time),
    }


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


def layout_json(layout: ParallelLayout) -> dict[str, Any]:
    """Sizes of all axes, the data-parallel ones included."""
    return {
        **asdict(layout),
        "data_parallel_size": layout.data_parallel_size,
        "expert_data_parallel_size": layout.expert_data_parallel_size,
    }


def hardware_json(hardware: Hardware) -> dict[str, Any]:
    """Every figure with its source."""
    return {f.name: getattr(hardware, f.name) for f in fields(hardware)} | {
        "intra_node": asdict(hardware.intra_node),
        "inter_node": asdict(hardware.inter_node),
        "is_measured": False,
    }


def step_time_json(time: StepTime) -> dict[str, Any]:
    """Predicted seconds by part."""
    return {
        "is_measured": False,
        "total_seconds": time.total_seconds,
        "compute_seconds": time.compute_seconds,
        "flop_seconds": time.flop_seconds,
        "weight_read_seconds": time.weight_read_seconds,
        "exposed_communication_seconds": time.exposed_seconds,
        "overlapped_communication_seconds": time.overlapped_seconds,
        "bubble_seconds": time.bubble_seconds,
        "optimizer_seconds": time.optimizer_seconds,
        "slowest_pipeline_rank": time.pipeline_rank,
        "tokens_per_second": time.tokens_per_second,
        "model_flops_utilisation": time.model_flops_utilisation,
        "communication": [
            {**asdict(entry), "exposed_seconds": entry.exposed_seconds}
            for entry in time.communication
        ],
    }


def number(value: Exact) -> int | float:
    """A whole number as it is, a fraction as the nearest float."""
    return value if isinstance(value, int) else float(value)
