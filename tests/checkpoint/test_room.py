"""A disk that cannot take a checkpoint is found before training, by what the plan says it holds."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
from small_run import PARITY, TINY, run_on

from vqmoe_megatron.checkpoint.inspection import inspect_checkpoint
from vqmoe_megatron.checkpoint.room import (
    MINIMUM_FREE_BYTES,
    check_checkpoint_room,
    check_some_room,
    missing_room,
    planned_bytes,
)
from vqmoe_megatron.config.recipe import load_recipe
from vqmoe_megatron.rundir.run_directory import RunDirectory


@pytest.fixture
def config():
    return load_recipe(PARITY, [*TINY, "model.vocab_size=256"])


@pytest.fixture
def run_dir(tmp_path) -> RunDirectory:
    run_dir = RunDirectory(tmp_path)
    run_dir.checkpoints.mkdir()
    return run_dir


@pytest.fixture
def free(monkeypatch, run_dir):
    """Free bytes by folder; change them."""
    free = {run_dir.path: 2**40, run_dir.checkpoints: 2**40}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free[path]))
    return free


def test_room_is_asked_of_the_disk_that_holds_checkpoints(config, run_dir, free):
    needed = planned_bytes(config) + MINIMUM_FREE_BYTES
    free[run_dir.checkpoints] = needed
    check_checkpoint_room(config, run_dir)
    free[run_dir.checkpoints] = needed - 1
    with pytest.raises(ValueError, match="no room for a checkpoint: it needs 0.07 GB and .*points"):
        check_checkpoint_room(config, run_dir)
    check_some_room(run_dir)
    assert "lower checkpoint.keep_last" in missing_room(run_dir, 2**41)
    free[run_dir.path] = MINIMUM_FREE_BYTES - 1
    with pytest.raises(ValueError, match="has 64 MiB free, less than 64 MiB"):
        check_some_room(run_dir)


def test_what_a_killed_save_left_counts_as_room(config, run_dir, free):
    free[run_dir.checkpoints] = planned_bytes(config) + MINIMUM_FREE_BYTES - 5
    left = run_dir.checkpoints / "iter_0000003.1234.incomplete"
    left.mkdir()
    (left / "__0_0.distcp").write_bytes(b"1234")
    with pytest.raises(ValueError, match="no room"):
        check_checkpoint_room(config, run_dir)
    (left / "common.pt").write_bytes(b"5")
    check_checkpoint_room(config, run_dir)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["vq.codebook_update=gradient", "model.moe_layer_freq=2"],
        ["model.bf16=true", "optimizer.use_distributed_optimizer=true"],
    ],
    ids=["ema", "gradient", "bf16"],
)
def test_the_plan_knows_a_checkpoint_up_to_statistics(overrides, ranks, small_corpus, tmp_path):
    every = [*TINY, *overrides, "train.train_iters=1", "optimizer.lr_warmup_iters=0"]
    run_on(ranks(1), small_corpus, tmp_path, every, {})
    config = load_recipe(PARITY, [*every, "model.vocab_size=256"])
    assert 0.9 < planned_bytes(config) / inspect_checkpoint(tmp_path).tensor_bytes <= 1
