"""Print docs/recipes.md: every recipe, with what ``vqmoe plan`` says about it.

python docs/recipe_table.py > docs/recipes.md

A recipe states its number of ranks in a comment line ``# ranks: N``; without one it is planned on
the fewest ranks its layout fits on. Recipes that leave the vocabulary to the corpus are planned
with 256 bytes. Needs no torch, no ranks and no corpus.
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vqmoe_megatron.config import RunConfig  # noqa: E402
from vqmoe_megatron.config.recipe import load_recipe  # noqa: E402
from vqmoe_megatron.plan.layout import minimum_world_size  # noqa: E402
from vqmoe_megatron.plan.run_plan import RunPlan, plan_run  # noqa: E402

GROUPS = {
    ".": "To start with",
    "paper_base": "The paper's base model",
    "scale": "64, 128 and 256 experts",
    "vision": "Images",
}
PREFACE = """\
# Recipes

Printed by `python docs/recipe_table.py > docs/recipes.md`; a test compares. What a column means is
said by `vqmoe plan`, which prints more for any recipe and any number of ranks:

    vqmoe plan recipes/scale/small_64.yaml --world-size 8

Parameters are those of the model; "active" are used by one token, its codebooks whole, because
every code is compared, of a code memory the rows that it reads. Memory is the planned peak of the
fullest rank, in GB of 10^9 bytes, without what the plan excludes: the Python process, CUDA's
context, fragmentation. Step times are predicted, not measured, for the named device
(`vqmoe_megatron/plan/hardware.py` has every assumption): every kernel at the roof of its unit;
small products, a slow host, stragglers and uneven experts come on top. A recipe that leaves its
vocabulary to the corpus is planned with 256 bytes here. The opening lines of a
recipe say how to prepare its corpus, how to start it, and the overrides of its baseline, a plain
sparse mixture of experts, and of the paper's layer.

Studies (`recipes/studies/`) are grids over one recipe, for `vqmoe study`.
"""
HEADER = """\
| recipe | what for | parameters | active | experts | codes, rows | ranks | layout | \
memory per rank | predicted step |
|---|---|---|---|---|---|---|---|---|---|
"""


def recipe_files() -> list[Path]:
    """Return the recipes, studies left out, in the order of their groups and sizes."""
    return [
        path
        for folder in GROUPS
        for path in sorted((ROOT / "recipes" / folder).glob("*.yaml"), key=_size_order)
    ]


def _size_order(path: Path) -> tuple[int, int, str]:
    size, _, experts = path.stem.rpartition("_")
    sizes = ("tiny", "small", "billion", "multi_billion")
    return (sizes.index(size), int(experts), "") if size in sizes else (-1, 0, path.stem)


def stated(path: Path, key: str) -> str | None:
    """Return the value of a recipe's comment line ``# key: value``; None without one."""
    found = re.search(rf"^# {key}: (.+)$", path.read_text("utf-8"), re.MULTILINE)
    return found[1] if found else None


def plan_recipe(path: Path, overrides: list[str]) -> RunPlan:
    """Plan a recipe on its stated ranks: H100, or the CPU for what reads data/stdlib or digits."""
    config: RunConfig = load_recipe(path, overrides)
    if config.model.vocab_size is None and not config.vision.is_on:
        config = replace(config, model=replace(config.model, vocab_size=256))
    ranks = int(stated(path, "ranks") or minimum_world_size(config))
    is_laptop = config.data.path in ("data/stdlib", "data/digits")
    return plan_run(config, ranks, "CPU" if is_laptop else "H100")


def row(path: Path) -> str:
    """Return the table row of one recipe."""
    plan = plan_recipe(path, [])
    config = plan.config
    parallel = config.parallel
    axes = {
        "TP": parallel.tensor_model_parallel_size,
        "PP": parallel.pipeline_model_parallel_size,
        "VPP": parallel.virtual_pipeline_model_parallel_size or 1,
        "EP": parallel.expert_model_parallel_size,
        "ETP": parallel.expert_tensor_parallel_size,
        "DP": plan.layout.data_parallel_size,
    }
    what = re.match(r"# (.+?)(?<!vs)[.:](\s|$)", path.read_text("utf-8"), re.DOTALL)[1]
    name = path.relative_to(ROOT / "recipes").with_suffix("").as_posix()
    cells = [
        f"[{name}](../recipes/{name}.yaml)",
        " ".join(what.replace("\n# ", " ").split()),
        count(plan.parameters.total),
        count(plan.parameters.active),
        str(config.model.num_moe_experts),
        codes_and_rows(config),
        str(plan.world_size),
        " ".join(f"{axis}{size}" for axis, size in axes.items() if size > 1) or "one rank",
        f"{plan.memory_bytes / 1e9:.2f} GB",
        f"{duration(plan.step_time.total_seconds)} on {plan.hardware.name}",
    ]
    return f"| {' | '.join(cells)} |"


def codes_and_rows(config: RunConfig) -> str:
    """Return what a layer has beside its router: codes of its own, rows of a code memory."""
    vq, memory = config.vq, config.code_memory
    found = [f"{vq.num_code_slices * vq.num_codes:,} codes"] if vq.has_codes else []
    if memory.is_on:
        layers = memory.layers or range(1, config.model.num_layers + 1)
        found.append(f"{memory.num_addresses} x {memory.num_rows:,} rows in {len(layers)} layers")
    return ", ".join(found) or "none"


def count(elements: int) -> str:
    """Return three digits and a unit: 2.28 M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if elements >= size:
            return f"{elements / size:.3g} {unit}"
    return str(elements)


def duration(seconds: float) -> str:
    """Return seconds, or milliseconds below one."""
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"


def page() -> str:
    """Return the whole text of docs/recipes.md."""
    parts = [PREFACE]
    for folder, title in GROUPS.items():
        rows = [row(path) for path in recipe_files() if path.parent == ROOT / "recipes" / folder]
        parts.append(f"\n## {title}\n\n{HEADER}" + "\n".join(rows) + "\n")
    return "".join(parts)


if __name__ == "__main__":
    sys.stdout.write(page())
