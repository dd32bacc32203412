"""Saves in the background, on request, and on a disk that has no room."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from small_run import PARITY, TINY, layout_overrides, run_on
from troubled_run import (
    train_on_a_full_disk,
    train_until_killed_before_the_tracker,
    train_with_a_small_file_limit,
)

from vqmoe_megatron.checkpoint.folder import complete_checkpoints, find_checkpoint

pytestmark = pytest.mark.distributed

EP2 = {"expert_model_parallel_size": 2}
DROPOUT = ["model.hidden_dropout=0.1", "optimizer.use_distributed_optimizer=true"]


def curve(results):
    return {r["iteration"]: (r["loss"], r["grad_norm"]) for r in results[0]["records"]}


def test_a_background_save_holds_the_moment_it_was_asked_for(ranks, small_corpus, tmp_path):
    every = [*TINY, *DROPOUT, "train.train_iters=10"]
    whole = run_on(ranks(2), small_corpus, tmp_path / "whole", every, EP2)
    run_dir = tmp_path / "run"
    saving = [*every, "checkpoint.async_save=true", "checkpoint.save_interval=3"]
    first = run_on(ranks(2), small_corpus, run_dir, [*saving, "train.exit_interval=5"], EP2)
    checkpoints = run_dir / "checkpoints"
    assert complete_checkpoints(checkpoints) == ["iter_0000003", "iter_0000005"]
    # Back to the one that was written while training went on.
    shutil.rmtree(checkpoints / "iter_0000005")
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("3\n")
    second = run_on(ranks(2), small_corpus, run_dir, saving, EP2)
    assert sorted(curve(second)) == list(range(4, 11))
    assert curve(first) | curve(second) == curve(whole)
    assert [rank["codebooks"] for rank in second] == [rank["codebooks"] for rank in whole]
    assert list(checkpoints.glob("*.incomplete")) == []


def test_saves_and_pruning_leave_alone_what_no_save_wrote(ranks, small_corpus, tmp_path):
    """A folder of the name that comes next, notes in an old checkpoint, a link in place of one."""
    checkpoints = tmp_path / "checkpoints"
    every = [*TINY, "train.train_iters=6", "checkpoint.save_interval=1", "checkpoint.keep_last=1"]
    stopped = [*every, "train.exit_interval=2", "checkpoint.keep_last=2"]
    run_on(ranks(1), small_corpus, tmp_path, stopped, {})
    (checkpoints / "iter_0000001" / "notes.md").write_text("mine")
    (checkpoints / "iter_0000002").rename(tmp_path / "archived")
    (checkpoints / "iter_0000002").symlink_to(tmp_path / "archived")
    (checkpoints / "iter_0000003").mkdir()
    (checkpoints / "iter_0000003" / "precious").write_text("mine")
    (result,) = run_on(ranks(1), small_corpus, tmp_path, every, {})
    assert result["state"] == "completed"
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "iter_0000001",
        "iter_0000002",
        "iter_0000003.kept_1",
        "iter_0000006",
        "latest_checkpointed_iteration.txt",
    ]
    assert (checkpoints / "iter_0000001" / "notes.md").read_text() == "mine"
    assert (checkpoints / "iter_0000003.kept_1" / "precious").read_text() == "mine"
    assert (tmp_path / "archived" / "metadata.json").is_file()


@pytest.mark.parametrize("in_background", [False, True])
def test_a_write_that_fails_on_the_way_costs_that_checkpoint_only(
    in_background, ranks, small_corpus, tmp_path
):
    every = [
        *TINY,
        *layout_overrides(EP2),
        f"data.path={small_corpus}",
        "train.train_iters=8",
        "train.exit_interval=4",
    ]
    every += [f"train.output_dir={tmp_path}", "checkpoint.save_interval=1"]
    every += [f"checkpoint.async_save={str(in_background).lower()}", "checkpoint.keep_last=9"]
    results = ranks(2).run(train_with_a_small_file_limit, str(PARITY), every, 2, layout=EP2)
    assert [result["iteration"] for result in results] == [4, 4]
    assert complete_checkpoints(tmp_path / "checkpoints") == [
        f"iter_000000{number}" for number in (1, 3, 4)
    ]
    assert "iteration 2 was not written" in " ".join(results[0]["messages"])


def test_a_last_save_that_fails_is_an_error_on_every_rank(ranks, small_corpus, tmp_path):
    every = [
        *TINY,
        *layout_overrides(EP2),
        f"data.path={small_corpus}",
        "train.train_iters=8",
        "train.exit_interval=2",
    ]
    every += [f"train.output_dir={tmp_path}", "checkpoint.save_interval=1"]
    results = ranks(2).run(train_with_a_small_file_limit, str(PARITY), every, 2, layout=EP2)
    for result in results:
        assert "the checkpoint of iteration 2 was not written" in result["error"]
    assert find_checkpoint(tmp_path).name == "iter_0000001"


@pytest.mark.full
def test_a_code_memory_goes_on_bit_by_bit_after_a_last_save_that_failed(
    ranks, small_corpus, tmp_path
):
    """Rows of layer 1 and codes that move go back to the checkpoint before."""
    every = [*TINY, "vq.path=continuous", "code_memory.num_rows=64", "code_memory.num_codes=64"]
    every += ["code_memory.codes=embedding", "code_memory.layers=[1]", "code_memory.lr_mult=5"]
    every += ["train.train_iters=6"]
    every += ["checkpoint.save_interval=2", "optimizer.lr_warmup_iters=1"]
    whole = run_on(ranks(2), small_corpus, tmp_path / "whole", every, EP2)
    run_dir = tmp_path / "run"
    stopped = [*every, *layout_overrides(EP2), f"data.path={small_corpus}"]
    stopped += [f"train.output_dir={run_dir}", "train.exit_interval=4"]
    results = ranks(2).run(train_with_a_small_file_limit, str(PARITY), stopped, 4, layout=EP2)
    assert all("iteration 4 was not written" in result["error"] for result in results)
    assert find_checkpoint(run_dir).name == "iter_0000002"
    again = run_on(ranks(2), small_corpus, run_dir, every, EP2)
    assert sorted(curve(again)) == [3, 4, 5, 6]
    assert curve(whole) == {**curve(whole), **curve(again)}
    assert [rank["streams"] for rank in again] == [rank["streams"] for rank in whole]


def test_a_kill_between_naming_a_checkpoint_and_tracking_it_loses_nothing(
    ranks, small_corpus, tmp_path
):
    every = [*TINY, "train.train_iters=3", "checkpoint.save_interval=2"]
    every += ["optimizer.lr_warmup_iters=0"]
    where = [f"data.path={small_corpus}", f"train.output_dir={tmp_path}"]
    ranks(1).run(train_until_killed_before_the_tracker, str(PARITY), [*every, *where])
    checkpoints = tmp_path / "checkpoints"
    assert not (checkpoints / "latest_checkpointed_iteration.txt").exists()
    assert find_checkpoint(tmp_path) == checkpoints / "iter_0000002"
    again = run_on(ranks(1), small_corpus, tmp_path, every, {})
    assert list(curve(again)) == [3]
    assert find_checkpoint(tmp_path).name == "iter_0000003"
    assert not (checkpoints / "latest_checkpointed_iteration.txt.tmp").exists()


def test_too_little_room_is_noticed_before_anything_is_written(ranks, small_corpus, tmp_path):
    every = [*TINY, f"data.path={small_corpus}", f"train.output_dir={tmp_path}"]
    every += [*layout_overrides(EP2), "train.train_iters=8", "train.exit_interval=2"]
    for result in ranks(2).run(train_on_a_full_disk, str(PARITY), every, layout=EP2):
        assert "GB free; free some, or lower checkpoint.keep_last" in result["error"]
    assert list(tmp_path.glob("checkpoints/*")) == []


def test_the_save_file_saves_and_training_goes_on(ranks, small_corpus, tmp_path):
    (tmp_path / "SAVE").touch()
    results = run_on(
        ranks(2),
        small_corpus,
        tmp_path,
        [*TINY, "train.train_iters=8", "train.exit_interval=4"],
        EP2,
    )
    assert [result["state"] for result in results] == ["completed", "completed"]
    assert complete_checkpoints(tmp_path / "checkpoints") == ["iter_0000001", "iter_0000004"]
    assert not (tmp_path / "SAVE").exists()
    layout = json.loads(Path(tmp_path, "checkpoints/iter_0000001/layout.json").read_text())
    assert (layout["world_size"], layout["expert_model_parallel_size"]) == (2, 2)
