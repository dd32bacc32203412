"""``vqmoe plan``: what a recipe costs on a number of ranks, before any is started.

Exits: 0 planned, 1 when a simulation differs from the plan, 2 for a layout that cannot run.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from vqmoe_megatron import registry
from vqmoe_megatron.cli.plan_tables import (
    show_errors,
    show_plan,
    show_search,
    show_simulation,
)
from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.config.recipe import load_recipe
from vqmoe_megatron.data.corpus import load_corpus
from vqmoe_megatron.plan.hardware import PROFILES, hardware_profile
from vqmoe_megatron.plan.layout import minimum_world_size
from vqmoe_megatron.plan.run_plan import RunPlan, default_hardware, number, plan_json, plan_run
from vqmoe_megatron.plan.search import search_json, search_layouts
from vqmoe_megatron.runtime.table_console import table_console
from vqmoe_megatron.simulate.simulated_step import SimulatedStep, SimulationFailed, simulate_step

FAILED, REFUSED = 1, 2
ASSUMED_VOCABULARY = 32_000


def plan(
    recipe: Annotated[
        Path, typer.Argument(help="YAML recipe, for instance recipes/quickstart.yaml")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, for instance vq.num_codes=512")
    ] = None,
    world_size: Annotated[
        int | None,
        typer.Option(min=1, help="ranks; default: the fewest the layout fits on"),
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(PROFILES)}: assumed figures; default: CPU for train.device=cpu, "
            "else H100"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    search: Annotated[
        bool, typer.Option("--search", help="propose the best layouts for the world size")
    ] = False,
    simulate: Annotated[
        bool,
        typer.Option(
            "--simulate",
            help="take a step of the real model on a fake process group and count what it sends",
        ),
    ] = False,
) -> None:
    """Plan a run: ranks, owners, parameters, memory, operations, wire bytes, predicted step time.

    Needs no GPU and starts no ranks. Exit code 2 for a layout that cannot run, with every broken
    rule as an equation.

    Example: vqmoe plan recipes/scale/small_64.yaml --world-size 8 --hardware H100
    """
    config, assumptions = _with_vocabulary(load_recipe(recipe, overrides or []))
    assumptions += _foreign_parts(config) + _deepspeed_parts(config) + _fp8_parts(config)
    ranks = world_size or minimum_world_size(config)
    profile = hardware_profile(hardware or default_hardware(config))
    planned = plan_run(config, ranks, profile)
    described = plan_json(planned, assumptions) if as_json else {}
    code = REFUSED if planned.errors else 0
    if search:
        code = _search(planned, assumptions, described, as_json)
    elif not as_json and planned.errors:
        show_errors(planned, table_console(sys.stderr))
    elif not as_json:
        show_plan(planned, assumptions, table_console(sys.stdout))
    if simulate and planned.errors:
        print(f"no simulation: {planned.refusal}", file=sys.stderr)
    elif simulate:
        try:
            simulated = simulate_step(config, ranks)
        except SimulationFailed as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(FAILED) from None
        described["simulation"] = _simulation_json(simulated)
        if not as_json:
            show_simulation(simulated, table_console(sys.stdout))
        code = code if simulated.matches else FAILED
    if as_json:
        print(json.dumps(described, indent=2))
    raise typer.Exit(code)


def _foreign_parts(config: RunConfig) -> list[str]:
    """What is counted as if it were ours, since a plan loads no package's part."""
    chosen = {
        "quantizer": config.vq.quantizer,
        "router": config.model.moe_router,
        "task": config.train.task,
        "engine": config.train.engine,
    }
    return [
        f"{registry.KINDS[kind].key}={name} is not of this package; its parameters, operations and "
        f"bytes are counted as those of {next(iter(registry.KINDS[kind].built_in))}"
        for kind, name in chosen.items()
        if not registry.is_ours(kind, name)
    ]


def _deepspeed_parts(config: RunConfig) -> list[str]:
    """What of ZeRO is not counted."""
    if config.train.engine != "deepspeed":
        return []
    return [
        "train.engine=deepspeed: parameters and operations are its own; optimizer memory, gradient "
        "and parameter traffic are counted as those of train.engine=megatron without a distributed "
        "optimizer, as with train.zero_stage=0"
    ]


def _fp8_parts(config: RunConfig) -> list[str]:
    """How fp8 is counted, and whether a run started here would be refused."""
    if config.model.fp8 is None:
        return []
    from vqmoe_megatron.runtime.fused_parts import FP8

    said = [f"model.fp8={config.model.fp8} is counted as if its products were not in fp8"]
    if (obstacle := FP8.obstacle()) is not None:
        said.append(f"model.fp8={config.model.fp8} would be refused on this machine: {obstacle}")
    return said


def _with_vocabulary(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """Fill in ``model.vocab_size`` from the corpus; without one, assume a size and say so."""
    if config.model.vocab_size is not None or config.vision.is_on:
        return config, []
    assumptions = []
    try:
        size = load_corpus(Path(config.data.path)).vocab_size
    except ValueError as error:
        size = ASSUMED_VOCABULARY
        assumptions.append(
            f"model.vocab_size={size}, because the recipe sets none and there is no corpus to take "
            f"it from ({error}); set model.vocab_size=N to plan for another"
        )
    return replace(config, model=replace(config.model, vocab_size=size)), assumptions


def _search(
    planned: RunPlan, assumptions: list[str], described: dict[str, Any], as_json: bool
) -> int:
    """Search the layouts of the world; 2 when none of them can run."""
    result = search_layouts(planned.config, planned.world_size, planned.hardware)
    described["search"] = search_json(result)
    if not as_json:
        console = table_console(sys.stdout)
        show_search(result, planned.world_size, planned.hardware.name, console)
        for sentence in assumptions:
            console.print(f"assumed: {sentence}")
    return 0 if result.best else REFUSED


def _simulation_json(simulated: SimulatedStep) -> dict[str, Any]:
    return {
        "matches": simulated.matches,
        "num_microbatches": simulated.num_microbatches,
        "num_microbatches_of_run": simulated.num_microbatches_of_run,
        "seconds": simulated.seconds,
        "cpu_seconds": simulated.cpu_seconds,
        "peak_memory_bytes": simulated.peak_memory_bytes,
        "notes": list(simulated.notes),
        "ranks": [
            {
                "rank": rank.rank,
                "pipeline_rank": rank.pipeline_rank,
                "num_parameters": rank.num_parameters,
                "sent_bytes": number(rank.sent_bytes),
                "collectives": [
                    {
                        "collective": entry.collective,
                        "axis": entry.axis,
                        "planned_calls": entry.planned[0],
                        "planned_bytes": number(entry.planned[1]),
                        "simulated_calls": entry.counted[0],
                        "simulated_bytes": number(entry.counted[1]),
                    }
                    for entry in simulated.comparison(rank)
                ],
            }
            for rank in simulated.ranks
        ],
    }
