"""Whose steps ``step_ratio.py`` times: the default beside plain mixtures, or a study's arms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vqmoe_megatron.study.study import load_study

QUICKSTART = Path(__file__).resolve().parents[1] / "recipes" / "quickstart.yaml"
NO_MEMORY = ("vq.path=continuous", "code_memory.num_rows=0")
BASE = ("model.num_moe_experts=16", "optimizer.lr=3e-3", "optimizer.lr_warmup_iters=1")


@dataclass(frozen=True)
class Size:
    """One row of ranks: every arm is measured on it with these overrides more."""

    name: str
    num_ranks: int
    overrides: tuple[str, ...] = ()

    @property
    def layout_overrides(self) -> tuple[str, ...]:
        """All ranks hold experts."""
        return (f"parallel.expert_model_parallel_size={self.num_ranks}", *self.overrides)


@dataclass(frozen=True)
class Comparison:
    """Arms (name: overrides of the recipe), the first of which the others are set beside."""

    title: str
    about: str
    recipe: Path
    arms: Mapping[str, tuple[str, ...]]
    sizes: tuple[Size, ...]


def of_the_default() -> Comparison:
    """What one pays for the quickstart's code memory, at four sizes."""
    own = {
        "SMoE top-1": NO_MEMORY,
        "SMoE top-2": (*NO_MEMORY, "model.moe_router_topk=2"),
        "default": (),
        "the paper's layer, K 64": ("code_memory.num_rows=0", "vq.path=dual", "vq.num_codes=64"),
        "filled, threshold, K 16": (
            "code_memory.num_rows=0",
            "vq.path=filled",
            "vq.threshold_routing=true",
            "vq.num_codes=16",
        ),
    }
    large = ("train.global_batch_size=64",)
    return Comparison(
        title="Step time of the default against SMoE",
        about="`recipes/quickstart.yaml` (4 layers, H 128, F 256) with 16 experts",
        recipe=QUICKSTART,
        arms={arm: (*BASE, *overrides) for arm, overrides in own.items()},
        sizes=(
            Size("1 rank, 2,048 tokens a step", 1),
            Size("1 rank, 16,384 tokens a step", 1, large),
            Size("EP2, 2,048 tokens a step", 2),
            Size("EP2, 16,384 tokens a step", 2, large),
        ),
    )


def of_a_study(path: Path) -> Comparison:
    """Every run of a study's first seed, on one rank, with its own batch sizes and ``--corpus``.

    Raises:
        ValueError: for a study that is wrong, or has runs of several ranks.
    """
    study = load_study(path)
    runs = list(study.runs.values())
    seed = runs[0].point.get("seed")
    chosen = [run for run in runs if run.point.get("seed") == seed]
    if any(run.num_ranks != 1 for run in chosen):
        raise ValueError(f"{path}: runs of several ranks; only those of one are timed in turns")
    arms = {
        " ".join(str(value) for axis, value in run.point.items() if axis != "seed"): run.overrides
        for run in chosen
    }
    return Comparison(
        title=f"Step time of the arms of {study.file.name}",
        about=f"`{path}`: the runs of its first seed",
        recipe=study.file.recipe,
        arms=arms,
        sizes=(Size("1 rank", 1),),
    )
