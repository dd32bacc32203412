"""Every recipe: its opening lines, its layout, its plan, and the page that lists them."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from vqmoe_megatron.config.recipe import flatten_config, load_recipe
from vqmoe_megatron.plan.layout import check_layout

ROOT = Path(__file__).resolve().parents[1]
MAX_LINE = 110
GPU_BYTES = 80 * 10**9

_spec = importlib.util.spec_from_file_location("recipe_table", ROOT / "docs" / "recipe_table.py")
table = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(table)

RECIPES = table.recipe_files()
NAMES = [path.relative_to(ROOT / "recipes").as_posix() for path in RECIPES]
LATER = [path for path in RECIPES if path.parent != ROOT / "recipes"]
SCALES = ("tiny", "small", "billion", "multi_billion")
EXPERTS = (64, 128, 256)
SPANNED = ("small_64", "small_128", "billion_64", "billion_128", "billion_256")

each_recipe = pytest.mark.parametrize("path", RECIPES, ids=NAMES)
each_later = pytest.mark.parametrize("path", LATER, ids=[path.stem for path in LATER])


SMOE, PAPER = "SMoE baseline", "The paper's layer"


def is_of_paper(path: Path) -> bool:
    """Whether a recipe trains the paper's layer, and so has no code memory."""
    return path.parent.name in ("paper_base", "vision")


def opening(path: Path) -> str:
    lines = path.read_text("utf-8").splitlines()
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


def test_all_of_them_are_found() -> None:
    wanted = {"quickstart.yaml", "parity.yaml"}
    corpora = ("enwik8", "text8", "wikitext103", "lm1b")
    wanted |= {f"paper_base/{name}{of}.yaml" for name in corpora for of in ("", "_txl")}
    wanted |= {"paper_base/released_enwik8.yaml"}
    wanted |= {f"vision/{name}.yaml" for name in ("digits", "cifar10", "imagenet1k")}
    wanted |= {f"scale/{scale}_{experts}.yaml" for scale in SCALES for experts in EXPERTS}
    assert set(NAMES) == wanted
    elsewhere = {path for path in (ROOT / "recipes").rglob("*.yaml") if path not in RECIPES}
    assert {path.parent.name for path in elsewhere} <= {"studies"}


@each_recipe
def test_a_recipe_opens_with_a_command_and_keeps_its_lines_short(path: Path) -> None:
    text = opening(path)
    assert "# vqmoe prepare " in text or path.stem == "parity"
    name = path.relative_to(ROOT).as_posix()
    start = r"(vqmoe pretrain|slurm/submit\.sh -N \d+ --gpus-per-node=8 --ntasks-per-node=8 "
    start += r"slurm/pretrain\.sbatch \\\n#    )"
    assert re.search(rf"{start} {re.escape(name)}", text)
    lines = path.read_text("utf-8").splitlines()
    overrides = tuple(f"# {key}: " for key in (SMOE, PAPER))
    too_long = [x for x in lines if len(x) > MAX_LINE and not x.startswith(overrides)]
    assert too_long == [] or path.stem == "parity"


@each_later
def test_it_states_source_ranks_parameters_and_baseline(path: Path) -> None:
    assert re.search(r"^# Sources?: ", opening(path), re.MULTILINE)
    for key in ("ranks", "parameters", SMOE, *([] if is_of_paper(path) else [PAPER])):
        assert table.stated(path, key), f"{path.name} lacks the line '# {key}: ...'"
    config = load_recipe(path, [])
    assert config.train.output_dir.startswith("runs/") and path.stem in config.train.output_dir


@each_later
def test_the_layout_fits_with_and_without_the_baseline(path: Path) -> None:
    ranks = int(table.stated(path, "ranks"))
    recipe = load_recipe(path, [])
    baseline = load_recipe(path, shlex.split(table.stated(path, SMOE)))
    of_paper = load_recipe(path, shlex.split(table.stated(path, PAPER) or ""))
    for config in (recipe, baseline, of_paper):
        check_layout(config, ranks, "cuda")
    assert baseline.vq.path == "continuous" and of_paper.vq.path == "dual"
    assert not baseline.code_memory.is_on and not of_paper.code_memory.is_on
    directories = {each.train.output_dir for each in (recipe, baseline, of_paper)}
    assert len(directories) == (2 if is_of_paper(path) else 3)  # no run goes on in another's
    assert recipe.code_memory.is_on != is_of_paper(path)
    rows = recipe.model.moe_router_topk
    rows += recipe.vq.num_code_slices if recipe.vq.path == "dual" else 0
    assert baseline.model.moe_router_topk == rows  # as many expert rows per token


@pytest.mark.parametrize("experts", EXPERTS)
def test_tiny_ones_run_on_eight_ranks_as_they_say(experts: int) -> None:
    path = ROOT / "recipes" / "scale" / f"tiny_{experts}.yaml"
    words = shlex.split(table.stated(path, "On eight ranks"))
    assert words[:2] == ["--nproc", "8"]
    layout = check_layout(load_recipe(path, words[2:]), 8, "cpu")
    assert layout.expert_model_parallel_size == 8


@each_recipe
def test_the_plan_has_no_errors_and_the_stated_parameters(path: Path) -> None:
    plan = table.plan_recipe(path, [])
    assert plan.errors == ()
    assert plan.memory_bytes < GPU_BYTES
    if path in LATER:
        count = f"{plan.parameters.total:,} total, {plan.parameters.active:,} active"
        assert table.stated(path, "parameters") == count


@pytest.mark.parametrize("scale", SCALES)
def test_recipes_of_a_scale_differ_in_experts_codes_and_ranks_only(scale: str) -> None:
    paths = [ROOT / "recipes" / "scale" / f"{scale}_{experts}.yaml" for experts in EXPERTS]
    configs = [load_recipe(path, []) for path in paths]
    flat = [flatten_config(config) for config in configs]
    differing = {key for key in flat[0] if len({str(each[key]) for each in flat}) > 1}
    allowed = {
        "model.num_moe_experts",
        "vq.num_codes",
        "parallel.expert_model_parallel_size",
        "train.output_dir",
    }
    assert differing <= allowed
    assert [config.model.num_moe_experts for config in configs] == list(EXPERTS)
    totals = [table.plan_recipe(path, []).parameters.total for path in paths]
    assert totals[0] * 1.5 < totals[1] and totals[1] * 1.5 < totals[2]
    # Billions of parameters where the name says so, and a token costs the same experts in each.
    assert ("billion" in scale) == (totals[0] >= 10**9) and ("multi" in scale) == (
        totals[0] >= 10**10
    )
    active = [table.plan_recipe(path, []).parameters.active_by_part["experts"] for path in paths]
    assert len(set(active)) == 1


@pytest.mark.parametrize("name", SPANNED)
def test_codes_are_the_most_that_the_span_leaves(name: str) -> None:
    """N + K + 2 <= hidden_size with K a multiple of N, as the recipes say of themselves."""
    config = load_recipe(ROOT / "recipes" / "scale" / f"{name}.yaml", [])
    experts, codes = config.model.num_moe_experts, config.vq.num_codes
    assert codes % experts == 0
    assert experts + codes + 2 <= config.model.hidden_size < experts + codes + experts + 2


def test_recipes_beyond_one_node_have_whole_nodes_and_the_stated_number_of_them() -> None:
    for path in LATER:
        ranks = int(table.stated(path, "ranks"))
        nodes = re.search(r"submit\.sh -N (\d+) ", opening(path))
        if ranks > 8:
            assert nodes is not None and int(nodes[1]) * 8 == ranks


def test_the_page_is_what_the_script_prints() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text("utf-8")
    assert page == table.page(), "print it again: python docs/recipe_table.py > docs/recipes.md"
