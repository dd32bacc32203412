"""``vqmoe preflight``: check a recipe for a world, or the world itself, before training starts."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vqmoe_megatron.config.recipe import load_recipe
from vqmoe_megatron.runtime.standard_streams import print_path
from vqmoe_megatron.runtime.versions import check_versions

GIB = 2**30
EXIT_GOOD, EXIT_BAD, EXIT_USAGE = 0, 1, 2


def preflight(
    recipe: Annotated[Path | None, typer.Argument(help="YAML recipe; not with --run-dir")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, as for vqmoe pretrain")
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="check the ranks for this run directory, without a recipe")
    ] = None,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="check the recipe for so many ranks; starts none")
    ] = None,
    print_run_dir: Annotated[
        bool, typer.Option(help="with --world-size: print the run directory as the last line")
    ] = False,
    wait_seconds: Annotated[float, typer.Option(help="for all ranks to come")] = 300.0,
) -> None:
    """Compare nodes and try the network on all ranks of srun or torchrun; name the bad nodes.

    With --world-size it only checks the recipe, on one process. Exits: 0 good, 1 bad nodes or
    network, 2 a refused recipe.

    Example: srun -N 4 vqmoe preflight recipes/parity.yaml parallel.expert_model_parallel_size=4
    """
    check_versions()
    if recipe is None and run_dir is None:
        raise ValueError("vqmoe preflight needs a RECIPE, or --run-dir for the ranks alone")
    if recipe is not None and run_dir is not None:
        raise ValueError("give a RECIPE, whose train.output_dir is used, or --run-dir, not both")
    if world_size is not None:
        if recipe is None:
            raise ValueError("--world-size checks a RECIPE; leave --run-dir out")
        _check_recipe(recipe, overrides or [], world_size, print_run_dir)
        return
    if print_run_dir:
        raise ValueError("--print-run-dir needs --world-size")
    if recipe is not None:
        run_dir = Path(load_recipe(recipe, overrides or []).train.output_dir)
    _check_ranks(run_dir.resolve(), wait_seconds)


def _check_recipe(recipe: Path, overrides: list[str], world_size: int, prints: bool) -> None:
    from vqmoe_megatron.runtime.world import choose_device
    from vqmoe_megatron.train.preflight import check_run

    config = load_recipe(recipe, overrides)
    device, _ = choose_device(config.train.device)
    run = check_run(config, world_size, device)
    resume = f", goes on from {run.resume_from.name}" if run.resume_from else ""
    print(f"{recipe} is legal on {world_size} ranks{resume}")
    if prints:
        print_path(run.run_dir.path.resolve())


def _check_ranks(run_dir: Path, wait_seconds: float) -> NoReturn:
    """Check the world and end the process at once: a thread may hang in a collective."""
    from vqmoe_megatron.runtime.node_facts import nodes_of_ranks
    from vqmoe_megatron.runtime.preflight_ranks import check_world
    from vqmoe_megatron.runtime.rendezvous import RendezvousFailed
    from vqmoe_megatron.runtime.world import choose_device, discover_rank

    variables = discover_rank()
    device, _ = choose_device("auto")
    code = EXIT_BAD
    try:
        report = check_world(variables, device, run_dir, wait_seconds)
        code = EXIT_GOOD if report.is_good else EXIT_BAD
        if variables.rank == 0:
            _print_report(report, variables.world_size)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_USAGE
    except RendezvousFailed as error:
        print(f"rank {variables.rank}: {error}")
        nodes = nodes_of_ranks(error.missing, variables.world_size, os.environ)
        if nodes:
            print(f"bad nodes: --exclude={','.join(nodes)}")
    except OSError as error:
        print(f"rank {variables.rank}: {run_dir} cannot be used: {error}")
    except Exception:  # the end below would swallow it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _print_report(report, world_size: int) -> None:
    from vqmoe_megatron.runtime.rank_names import rank_names

    title = f"preflight of {world_size} ranks on {len({f.node for f in report.facts})} nodes"
    table = Table(title=title, title_justify="left")
    for header in ("node", "ranks", "Python", "torch", "megatron-core", "vqmoe", "devices"):
        table.add_column(header)
    for header in ("free GiB", "free inodes", "collectives"):
        table.add_column(header)
    bad = set(report.bad_nodes)
    for node in dict.fromkeys(fact.node for fact in report.facts):
        here = [fact for fact in report.facts if fact.node == node]
        first = here[0]
        wrong = [fact.rank for fact in here if fact.rank in report.wrong_collectives]
        row = (
            f"{node} (bad)" if node in bad else node,
            rank_names(fact.rank for fact in here).split(" ", 1)[1],
            first.python,
            first.torch,
            first.megatron_core,
            first.vqmoe_megatron,
            str(first.num_devices),
            f"{first.free_bytes / GIB:.1f}",
            "no limit" if first.free_inodes is None else f"{first.free_inodes:,}",
            f"wrong on {rank_names(wrong)}" if wrong else "right",
        )
        table.add_row(*(Text(cell) for cell in row))
    Console(width=160).print(table)
    for problem in report.problems:
        print(f"problem: {problem.text}")
    if report.bad_nodes:
        print(f"bad nodes: --exclude={','.join(report.bad_nodes)}")
    print("preflight: all good" if report.is_good else "preflight: refused")
