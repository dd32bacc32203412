"""A start goes on with its own run's records and replaces no other's; what is refused is kept."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.config.recipe import load_recipe, save_recipe
from vqmoe_megatron.rundir.file_names import RECORDS
from vqmoe_megatron.rundir.run_directory import RunDirectory
from vqmoe_megatron.rundir.status import write_status
from vqmoe_megatron.train.records import check_records, is_same_run

RECORD = '{"iteration": 1, "loss": 5.0}\n'
CONFIG = replace(RunConfig(), model=replace(RunConfig().model, vocab_size=256))


@pytest.fixture
def killed(tmp_path) -> RunDirectory:
    """The directory of a run of CONFIG that was killed before its first checkpoint."""
    run_dir = RunDirectory(tmp_path / "run")
    run_dir.create()
    save_recipe(CONFIG, run_dir.config)
    write_status(run_dir.path, "running", 0, "training")
    for name in ("metrics.jsonl", "system_metrics.jsonl"):
        (run_dir.path / name).write_text(RECORD)
    return run_dir


def changed(run_dir: RunDirectory, *overrides: str) -> RunConfig:
    """CONFIG with overrides, whatever the directory says."""
    recipe = run_dir.path.parent / "recipe.yaml"
    save_recipe(CONFIG, recipe)
    return load_recipe(recipe, list(overrides))


def contents(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.output_dir=elsewhere", "train.device=cpu", "train.log_interval=1"],
        ["parallel.expert_model_parallel_size=2", "optimizer.use_distributed_optimizer=true"],
        ["train.micro_batch_size=2", "model.recompute_granularity=full", "train.exit_interval=3"],
        ["tracking.mlflow=false", "checkpoint.save_interval=5", "checkpoint.keep_last=7"],
        [f"data.path={Path('data/stdlib').resolve()}"],  # the same place, written out
    ],
)
def test_the_same_run_goes_on_by_itself(overrides, killed):
    config = changed(killed, *overrides)
    assert is_same_run(killed, config)
    check_records(killed, config, None, 0)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["train.seed=99"], "train.seed: there 1234, recipe 99"),
        (["vq.num_codes=32"], "vq.num_codes: there 64, recipe 32"),
        (["optimizer.lr=0.5"], "optimizer.lr: there 0.001, recipe 0.5"),
        (["train.train_iters=9"], "optimizer.lr_decay_iters: there 200, recipe 9 (not set,"),
        (["train.global_batch_size=8"], "train.global_batch_size: there 32, recipe 8"),
        (["data.path=data/other"], "data.path: there 'data/stdlib', recipe 'data/other'"),
        (["checkpoint.load=runs/x"], "checkpoint.load: there None, recipe 'runs/x'"),
        (["checkpoint.load=x", "checkpoint.remap=true"], "checkpoint.remap: there False"),
    ],
)
def test_another_run_is_refused_and_told_the_ways_on(overrides, named, killed):
    before, config = contents(killed.path), changed(killed, *overrides)
    assert not is_same_run(killed, config)
    with pytest.raises(ValueError, match="records of another run") as refused:
        check_records(killed, config, None, 0)
    for text in (named, "metrics.jsonl, system_metrics.jsonl", "another train.output_dir"):
        assert text in str(refused.value)
    assert contents(killed.path) == before
    (killed.path / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match=r"\(system_metrics.jsonl, run_config.yaml\)"):
        check_records(killed, config, None, 0)
    (killed.path / "system_metrics.jsonl").write_text("")
    check_records(killed, config, None, 0)  # it never got as far as a record


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (None, "so these may be anybody's"),
        ("model: {num_layers: two}", "no recipe of this release"),
        ("{{", "no recipe of this release"),
        ("other: 1", "no recipe of this release"),
        ("", "emptied or cut: it lacks model, vq,"),
    ],
)
def test_records_whose_run_is_not_known_are_kept(recipe, says, killed):
    killed.config.unlink()
    if recipe is not None:
        killed.config.write_text(recipe)
    with pytest.raises(ValueError, match=f"run_config.yaml: .*{says}"):
        check_records(killed, CONFIG, None, 0)


@pytest.mark.parametrize("content", ["foo: bar", ""])
@pytest.mark.parametrize("has_status", [True, False])
def test_a_recipe_of_somebody_else_beside_an_own_checkpoint_is_kept(content, has_status, killed):
    own = killed.checkpoints / "iter_0000010"
    for name in ("metrics.jsonl", "system_metrics.jsonl"):
        (killed.path / name).unlink()
    if not has_status:
        (killed.path / "status.json").unlink()
    killed.config.write_text(content)
    with pytest.raises(ValueError, match="copy .*iter_0000010/run_config.yaml there"):
        check_records(killed, CONFIG, own, 10)


@pytest.mark.parametrize("name", [*RECORDS, "mlflow.json"])
def test_where_no_run_lived_a_file_with_a_runs_name_is_somebodys(name, tmp_path):
    run_dir = RunDirectory(tmp_path)
    (tmp_path / "plots").mkdir()
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"somebody's files, .* \({name}\)"):
        check_records(run_dir, CONFIG, None, 0)
    save_recipe(CONFIG, run_dir.config)
    write_status(tmp_path, "running", 0, "training")
    check_records(run_dir, CONFIG, None, 0)  # of this run, killed before its first checkpoint


def test_a_recipe_of_somebody_else_is_no_place_for_a_run(tmp_path):
    run_dir = RunDirectory(tmp_path)
    check_records(run_dir, CONFIG, None, 0)
    run_dir.config.write_text("my: notes\n")
    with pytest.raises(ValueError, match="run_config.yaml"):
        check_records(run_dir, CONFIG, None, 0)
    save_recipe(CONFIG, run_dir.config)
    check_records(run_dir, CONFIG, None, 0)


@pytest.mark.parametrize("state", ["completed", "requeue", "failed", "running"])
def test_a_run_whose_checkpoints_are_gone_is_not_begun_again(state, killed):
    write_status(killed.path, state, 40, "why")
    with pytest.raises(ValueError, match=f"says {state} at iteration 40, but .* no checkpoint"):
        check_records(killed, CONFIG, None, 0)
    # From another run's checkpoint of iteration 40 it had not saved anything of its own yet.
    check_records(killed, CONFIG, None, 40)
    check_records(killed, CONFIG, killed.checkpoints / "iter_0000040", 40)


def test_a_checkpoint_goes_on_only_with_the_log_of_its_own_run(killed):
    own = killed.checkpoints / "iter_0000010"
    longer = changed(killed, "train.exit_interval=7", "data.path=moved")  # it may
    check_records(killed, longer, own, 10)
    other = changed(killed, "train.seed=99")  # the recipe of a checkpoint copied in
    with pytest.raises(ValueError, match="train.seed: there 1234, recipe 99"):
        check_records(killed, other, own, 10)
    killed.config.unlink()
    check_records(killed, other, own, 10)
    for name in ("metrics.jsonl", "system_metrics.jsonl"):
        (killed.path / name).unlink()
    save_recipe(CONFIG, killed.config)
    check_records(killed, other, own, 10)  # nothing to replace


def test_where_paths_are_compared_links_are_followed(killed, tmp_path):
    config = changed(killed, f"data.path={tmp_path / 'a'}")
    save_recipe(config, killed.config)
    (tmp_path / "a").mkdir()
    os.symlink(tmp_path / "a", tmp_path / "b")
    assert is_same_run(killed, changed(killed, f"data.path={tmp_path / 'b'}"))
    shutil.rmtree(tmp_path / "a")
    assert not is_same_run(killed, changed(killed, f"data.path={tmp_path / 'c'}"))
