"""Points become checked runs; every problem of every point is told before any work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vqmoe_megatron.config.recipe import load_recipe
from vqmoe_megatron.plan.flops import layer_flops
from vqmoe_megatron.plan.layout import unsharded
from vqmoe_megatron.plan.parameter_count import count_parameters
from vqmoe_megatron.plan.shape import LayerShape
from vqmoe_megatron.study.planned_run import StudyPlanner
from vqmoe_megatron.study.study_file import read_study_file
from vqmoe_megatron.track.mlflow.sqlite_uri import sqlite_path


def planned(path):
    return {run.name: run for run in StudyPlanner(read_study_file(path)).plan_all()}


def test_the_overrides_lead_from_the_recipe_to_the_configuration(write_study) -> None:
    path = write_study(more=["tracking.mlflow=true"])
    recipe = read_study_file(path).recipe
    runs = planned(path)
    assert len(runs) == 4
    for run in runs.values():
        assert load_recipe(Path(recipe), list(run.overrides)) == run.config
    run = runs["experts8-smoe"]
    assert run.config.model.num_moe_experts == 8
    assert run.config.vq.path == "continuous" and run.num_ranks == 1
    assert run.run_dir.name == run.name and run.run_dir.parent.name == "runs"
    assert run.config.tracking.mlflow_uri.endswith("/study/mlflow.db")


def test_the_store_of_a_study_in_an_odd_folder_is_quoted(write_study, tmp_path) -> None:
    folder = tmp_path / "a?b %41" / "study"
    path = write_study(study={"output_dir": str(folder)}, more=["tracking.mlflow=true"])
    recipe = read_study_file(path).recipe
    for run in planned(path).values():
        assert sqlite_path(run.config.tracking.mlflow_uri) == folder / "mlflow.db"
        assert load_recipe(Path(recipe), list(run.overrides)) == run.config


def test_products_follow_the_point(write_study) -> None:
    runs = planned(write_study())
    assert runs["experts4-vq"].config.vq.num_codes == 8
    assert runs["experts8-vq"].config.vq.num_codes == 16
    grid = {"experts": [4], "codes": [3, "4 * model.num_moe_experts"]}
    runs = planned(write_study(grid=grid))
    assert runs["experts4-codes3"].config.vq.num_codes == 3
    assert runs["experts4-codes4xmodel.num_moe_experts"].config.vq.num_codes == 16
    runs = planned(write_study(grid={"seed": [1]}))
    assert runs["seed1"].config.vq.num_codes == 2 * 8  # the recipe's 8 experts


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("vq.num_codes=4 * expert", "'expert' is no setting"),
        ("vq.num_codes=4 * data.path", "is not a whole number"),
        ("vq.num_codes=experts * 4", "vq.num_codes: expected int"),
    ],
)
def test_bad_products_are_refused(text, says, write_study) -> None:
    with pytest.raises(ValueError, match=says):
        planned(write_study(more=[text], grid={"seed": [1]}))


def test_ranks_are_the_fewest_the_layout_fits_on_or_as_written(write_study) -> None:
    layouts = {"one": [], "ep2": ["parallel.expert_model_parallel_size=2"]}
    runs = planned(write_study(grid={"layout": layouts}))
    assert [run.num_ranks for run in runs.values()] == [1, 2]
    runs = planned(write_study(grid={"ranks": [1, 2, 4]}))
    found = {name: run.num_ranks for name, run in runs.items()}
    assert found == {"ranks1": 1, "ranks2": 2, "ranks4": 4}
    runs = planned(write_study(study={"num_ranks": 2}))
    assert {run.num_ranks for run in runs.values()} == {2}


def test_all_problems_of_all_points_are_told_together(write_study) -> None:
    layouts = {"ok": [], "ep3": ["parallel.expert_model_parallel_size=3"]}
    path = write_study(
        grid={"experts": [4, 8], "layout": layouts, "router": {"typo": ["vq.pth=dual"], "vq": []}}
    )
    with pytest.raises(ValueError) as refused:
        planned(path)
    said = str(refused.value)
    assert "experts4-ok-typo, experts4-ep3-typo, experts8-ok-typo and 1 more: " in said
    assert "did you mean vq.path" in said
    assert "num_moe_experts % EP != 0: 4 % 3 = 1" in said
    assert "num_moe_experts % EP != 0: 8 % 3 = 2" in said


def test_a_problem_of_all_runs_is_told_once(write_study) -> None:
    with pytest.raises(ValueError) as refused:
        planned(write_study(more=["vq.num_code=3"]))
    assert str(refused.value).count("vq.num_codes") == 1
    assert "all 4 runs" in str(refused.value)


def test_the_laptop_study_is_legal_and_compares_equals(monkeypatch) -> None:
    root = Path(__file__).resolve().parents[2]
    monkeypatch.chdir(root)
    runs = planned(Path("recipes/studies/stdlib_experts.yaml"))
    assert len(runs) == 3 * 4 * 4 and {run.num_ranks for run in runs.values()} == {1}
    assert len({run.num_tokens for run in runs.values()}) == 1
    largest = runs["seed1-experts128-vq_dual"].config
    assert largest.vq.num_codes == 512 and largest.vq.in_code_space
    assert not largest.code_memory.is_on
    shipped = load_recipe(root / "recipes" / "quickstart.yaml", [])
    assert runs["seed1-experts4-default"].config.code_memory == shipped.code_memory


def test_the_control_arms_have_the_operations_that_they_say(monkeypatch) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    runs = planned(Path("recipes/studies/control_arms.yaml"))
    assert len(runs) == 13 * 3 + 2 * 2  # two arms have five seeds
    layers = {
        name: layer_flops(LayerShape.from_config(runs[f"{name}-seed1"].config, unsharded()))
        for name in ("smoe_top1", "shared", "dense", "default")
    }
    mlps = {name: f["dispatched"].model + f["shared_expert"].model for name, f in layers.items()}
    assert mlps["shared"] == 2 * mlps["dense"] > 0
    assert mlps["smoe_top1"] == mlps["default"] == mlps["dense"]
    assert runs["dense-seed1"].config.experts_in_words.startswith("1 of width 128 for every token")
    totals = {}
    for name in ("default", "smoe_40"):
        config = runs[f"{name}-seed1"].config
        config = replace(config, model=replace(config.model, vocab_size=256))
        totals[name] = count_parameters(config, unsharded()).total
    assert totals["smoe_40"] == pytest.approx(totals["default"], rel=0.01)


def test_a_study_over_experts_may_begin_with_one(write_study) -> None:
    grid = {"experts": [1, 4], "router": {"smoe": ["vq.path=continuous"], "vq": ["vq.path=dual"]}}
    with pytest.raises(ValueError, match="experts1-smoe, experts1-vq: model.moe_router_topk=2"):
        planned(write_study(grid=grid))
    runs = planned(write_study(grid=grid, more=["model.moe_router_topk=1"]))
    assert {run.config.model.num_moe_experts for run in runs.values()} == {1, 4}


def test_points_that_are_the_same_run_are_refused(write_study) -> None:
    variants = {
        "one": [],
        "two": ["tracking.experiment=other", "train.exit_interval=3"],
        "three": ["train.seed=9"],
    }
    with pytest.raises(ValueError, match="one and two are the same run") as refused:
        planned(write_study(grid={"variant": variants}))
    assert "three" not in str(refused.value) and "\n" not in str(refused.value)
    assert len(planned(write_study(grid={"ranks": [1, 2]}))) == 2


def test_a_directory_with_yaml_marks_in_its_name_is_kept(write_study, tmp_path) -> None:
    folder = tmp_path / "'my study' #1: &x"
    more = ["tracking.mlflow=true"]
    path = write_study(study={"output_dir": str(folder)}, more=more)
    for run in planned(path).values():
        assert run.run_dir == folder / "runs" / run.name
        assert run.config.tracking.mlflow_uri == f"sqlite:///{folder}/mlflow.db"
        assert load_recipe(read_study_file(path).recipe, list(run.overrides)) == run.config
    for odd in ("'my study'", " ~ ", '"'):  # relative
        runs = planned(write_study(study={"output_dir": odd}, more=more))
        assert {run.run_dir.parent for run in runs.values()} == {Path(odd) / "runs"}
    with pytest.raises(ValueError, match="is not resolved here"):
        planned(write_study(study={"output_dir": "runs/${train.seed}"}))


def test_two_runs_in_one_directory_are_refused(write_study) -> None:
    planner = StudyPlanner(read_study_file(write_study(grid={"seed": [1, 2, 3]})))
    one, two, three = planner.plan_all()
    config = replace(two.config, train=replace(two.config.train, output_dir=f"{one.run_dir}/"))
    with pytest.raises(ValueError, match="seed1 and seed2 would both be written") as refused:
        planner._check_all_differ([one, replace(two, config=config), three])
    assert str(one.run_dir) in str(refused.value) and "seed3" not in str(refused.value)


def test_codes_that_do_not_matter_are_another_run(write_study) -> None:
    grid = {"codes": [8, 16], "router": {"smoe": ["vq.path=continuous"], "vq": ["vq.path=dual"]}}
    assert len(planned(write_study(grid=grid))) == 4
