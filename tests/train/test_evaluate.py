"""Validation does not depend on how the windows are dealt, and leaves training untouched."""

from __future__ import annotations

import pytest
from small_run import run_on

pytestmark = pytest.mark.distributed

EVERY = ["model.num_layers=2", "train.train_iters=2", "train.eval_iters=1"]
EVERY += ["optimizer.lr_warmup_iters=0"]


def validation(results):
    return [r["val/loss"] for r in results[0]["records"] if "val/loss" in r]


def test_validation_is_the_same_at_any_data_parallel_size_and_micro_batch(
    ranks, small_corpus, tmp_path
):
    # uniform codes: data initialisation reads one microbatch, whose size varies here
    every = [*EVERY, "vq.init=uniform", "data.eval_stride_tokens=16"]
    first = validation(run_on(ranks(1), small_corpus, tmp_path / "1", every, {}))
    assert len(first) == 2
    for number, (num_ranks, micro) in enumerate([(1, 4), (1, 16), (2, 1), (2, 8)]):
        overrides = [*every, f"train.micro_batch_size={micro}"]
        found = validation(
            run_on(ranks(num_ranks), small_corpus, tmp_path / f"run{number}", overrides, {})
        )
        assert found[0] == pytest.approx(first[0], rel=1e-6)


def test_evaluation_changes_nothing(ranks, small_corpus, tmp_path):
    dropout = ["model.hidden_dropout=0.1", "train.train_iters=4"]
    without = run_on(
        ranks(1), small_corpus, tmp_path / "a", [*EVERY, *dropout, "train.eval_iters=0"], {}
    )
    often = run_on(
        ranks(1), small_corpus, tmp_path / "b", [*EVERY, *dropout, "train.eval_interval=1"], {}
    )
    losses = [[r["loss"] for r in run[0]["records"] if "loss" in r] for run in (without, often)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert without[0]["codebooks"] == often[0]["codebooks"]
