"""Which checkpoint is meant, and which recipes may go on from it; no ranks, no torch."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from vqmoe_megatron.checkpoint.folder import (
    check_resumable,
    complete_checkpoints,
    find_checkpoint,
    has_same_layout,
    stored_tokenizer,
    written_at,
)
from vqmoe_megatron.config import CodeMemoryConfig, RunConfig
from vqmoe_megatron.config.recipe import load_recipe, save_recipe
from vqmoe_megatron.plan.layout import ParallelLayout


def write_checkpoint(run_dir, iteration, config=None, world_size=2):
    folder = run_dir / "checkpoints" / f"iter_{iteration:07d}"
    folder.mkdir(parents=True)
    config = config or RunConfig()
    save_recipe(config, folder / "run_config.yaml")
    layout = ParallelLayout.from_config(config, world_size)
    (folder / "layout.json").write_text(json.dumps(asdict(layout)))
    (folder / "corpus.json").write_text(json.dumps({"tokenizer": {"kind": "byte"}}))
    (folder / "metadata.json").write_text("{}")
    (folder.parent / "latest_checkpointed_iteration.txt").write_text(f"{iteration}\n")
    return folder


def test_a_run_directory_its_checkpoints_and_the_folder_mean_the_same(tmp_path):
    assert find_checkpoint(tmp_path) is None
    folder = write_checkpoint(tmp_path, 100)
    for path in (tmp_path, tmp_path / "checkpoints", folder):
        assert find_checkpoint(path) == folder
    (tmp_path / "checkpoints" / "iter_0000200.incomplete").mkdir()
    (tmp_path / "checkpoints" / "iter_0000300").mkdir()
    assert complete_checkpoints(tmp_path / "checkpoints") == ["iter_0000100"]
    assert find_checkpoint(tmp_path / "checkpoints" / "iter_0000300") is None


@pytest.mark.parametrize("content", [b"", b"latest", b"-5", b"\xff\xfe\x00", "١٢".encode(), b"7"])
def test_a_damaged_tracker_is_refused_with_what_is_there(tmp_path, content):
    write_checkpoint(tmp_path, 100)
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_bytes(content)
    with pytest.raises(ValueError, match="latest_checkpointed_iteration.txt.*iter_0000100"):
        find_checkpoint(tmp_path)


def test_a_missing_tracker_is_refused_unless_its_next_one_was_about_to_be_named(tmp_path):
    newest = write_checkpoint(tmp_path, 100)
    write_checkpoint(tmp_path, 50)
    tracker = newest.with_name("latest_checkpointed_iteration.txt")
    tracker.unlink()
    said = f"{tracker.name} is missing beside iter_0000050, iter_0000100; write the iteration"
    with pytest.raises(ValueError, match=said):
        find_checkpoint(tmp_path)
    following = tracker.with_name(f"{tracker.name}.tmp")
    for content in ("70\n", "", "half of it"):  # of a save that never got as far as a name
        following.write_text(content)
        with pytest.raises(ValueError, match=said):
            find_checkpoint(tmp_path)
    following.write_text("100\n")
    assert find_checkpoint(tmp_path) == newest
    (newest / "metadata.json").unlink()
    with pytest.raises(ValueError, match="complete one into .*: iter_0000050"):
        find_checkpoint(tmp_path)


def test_a_folder_without_its_description_is_no_empty_place(tmp_path):
    (write_checkpoint(tmp_path, 100) / "metadata.json").unlink()
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").unlink()
    with pytest.raises(ValueError, match="none is left: copy them again, or move"):
        find_checkpoint(tmp_path)


def test_a_tracker_that_is_no_file_is_refused(tmp_path):
    tracker = write_checkpoint(tmp_path, 100).with_name("latest_checkpointed_iteration.txt")
    tracker.unlink()
    tracker.mkdir()
    with pytest.raises(ValueError, match="latest_checkpointed_iteration.txt cannot be read"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("vq.num_codes=65", "vq.num_codes: checkpoint 64, recipe 65"),
        ("model.num_moe_experts=8", "model.num_moe_experts: checkpoint 16, recipe 8"),
        ("train.train_iters=300", "optimizer.lr_decay_iters: checkpoint 200, recipe 300"),
        ("optimizer.lr=0.5", "optimizer.lr: checkpoint 0.001, recipe 0.5"),
        ("train.global_batch_size=64", "train.global_batch_size: checkpoint 32, recipe 64"),
        ("code_memory.num_rows=64", "code_memory.num_rows: checkpoint 0, recipe 64"),
    ],
)
def test_another_model_or_schedule_is_refused(tmp_path, override, named):
    recipe = tmp_path / "recipe.yaml"
    save_recipe(RunConfig(), recipe)
    folder = write_checkpoint(tmp_path, 100)
    config = load_recipe(recipe, [override])
    with pytest.raises(ValueError, match="cannot be resumed") as refused:
        check_resumable(folder, config)
    assert named in str(refused.value)
    is_schedule = override.startswith("train.train_iters")
    assert ("optimizer.lr_decay_iters=200 keeps the old" in str(refused.value)) == is_schedule
    is_remappable = override.startswith(("vq.num_codes", "model.num_moe_experts"))
    assert ("checkpoint.remap=true" in str(refused.value)) == is_remappable


def test_what_does_not_change_the_mathematics_may_change(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    save_recipe(RunConfig(), recipe)
    folder = write_checkpoint(tmp_path, 100)
    free = ["model.recompute_granularity=full", "optimizer.overlap_grad_reduce=true"]
    free += ["train.train_iters=300", "optimizer.lr_decay_iters=200", "train.log_interval=1"]
    free += ["vq.execution=tokens", "vq.freeze_after_steps=7"]
    free += ["code_memory.exchange=table", "code_memory.freeze_after_steps=7"]
    free += ["parallel.expert_model_parallel_size=2", "optimizer.use_distributed_optimizer=true"]
    assert RunConfig() != load_recipe(recipe, free)
    check_resumable(folder, load_recipe(recipe, free))
    check_resumable(folder, load_recipe(recipe, ["vq.table_per_step=true"]))
    with pytest.raises(ValueError, match="vq.straight_through"):
        check_resumable(folder, load_recipe(recipe, [*free, "vq.straight_through=none"]))


OLDER = CodeMemoryConfig(codes="embedding", lr_mult=1.0)  # the defaults of an older release


def test_a_checkpoint_of_older_defaults_does_not_go_on_with_the_new_ones(tmp_path):
    """What a checkpoint says of its memory is compared, not taken for what is meant now."""
    stored = RunConfig(code_memory=replace(OLDER, num_rows=64))
    folder = write_checkpoint(tmp_path, 100, stored)
    with pytest.raises(ValueError, match="cannot be resumed") as refused:
        check_resumable(folder, RunConfig(code_memory=CodeMemoryConfig(num_rows=64)))
    for named in ("codes: checkpoint 'embedding', recipe 'tokens'", "lr_mult: checkpoint 1.0, rec"):
        assert f"code_memory.{named}" in str(refused.value)
    how = {"exchange": "table", "freeze_after_steps": 500}
    check_resumable(folder, RunConfig(code_memory=replace(stored.code_memory, **how)))


def test_settings_of_a_memory_that_is_off_decide_nothing(tmp_path):
    folder = write_checkpoint(tmp_path, 100, RunConfig(code_memory=OLDER))
    check_resumable(folder, RunConfig())
    with pytest.raises(ValueError, match="code_memory.num_rows: checkpoint 0, recipe 64"):
        check_resumable(folder, RunConfig(code_memory=CodeMemoryConfig(num_rows=64)))


def test_a_checkpoint_knows_the_layout_that_wrote_it(tmp_path):
    folder = write_checkpoint(tmp_path, 100)
    one_rank_more = ParallelLayout.from_config(RunConfig(), 3)
    assert has_same_layout(folder, ParallelLayout.from_config(RunConfig(), 2))
    assert not has_same_layout(folder, one_rank_more)
    (folder / "layout.json").unlink()
    with pytest.raises(ValueError, match="layout.json cannot be read"):
        written_at(folder)


def test_the_tokenizer_travels_with_the_checkpoint(tmp_path):
    folder = write_checkpoint(tmp_path, 100)
    assert stored_tokenizer(folder) == {"kind": "byte"}
    (folder / "corpus.json").write_text("{")
    with pytest.raises(ValueError, match="corpus.json cannot be read"):
        stored_tokenizer(folder)
