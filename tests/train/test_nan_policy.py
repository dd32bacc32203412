"""A step with a non-finite loss or gradient stops the run or is skipped, and never moves
anything."""

from __future__ import annotations

import json
import math

import pytest
from small_run import PARITY, TINY, run_on, start_vqmoe
from troubled_run import train_behind_a_bad_batch, train_with_one_poisoned_step

from vqmoe_megatron.rundir.status import read_status
from vqmoe_megatron.track.metrics_log import read_metrics

pytestmark = pytest.mark.distributed

EP2 = {"expert_model_parallel_size": 2}
# Every step multiplies the weights by 1 - lr * weight_decay = -99. In step 3 attention scores pass
# 1e8, and the backward of a fused attention, exp(score - logsumexp), overflows by their rounding.
EXPLODE = ["optimizer.lr=10", "optimizer.weight_decay=10", "optimizer.lr_decay_style=constant"]
EXPLODE += ["optimizer.lr_warmup_iters=0", "train.train_iters=9"]


def test_a_poisoned_step_is_skipped_on_all_ranks_and_training_goes_on(
    ranks, small_corpus, tmp_path
):
    every = [*TINY, "train.train_iters=6", "train.nan_policy=skip", f"data.path={small_corpus}"]
    every += [f"train.output_dir={tmp_path}", "parallel.expert_model_parallel_size=2"]
    results = ranks(2).run(train_with_one_poisoned_step, str(PARITY), every, layout=EP2)
    for result in results:
        assert (result["skipped"], result["iteration"], result["error"]) == (1, 6, "")
        losses = {record["iteration"]: record["loss"] for record in result["records"]}
        assert [number for number, loss in losses.items() if not math.isfinite(loss)] == [3]
        assert [r["skipped_iterations"] for r in result["records"]] == [0, 0, 1, 1, 1, 1]
        assert result["finite_codebooks"]
    assert results[0]["codebooks"] == results[1]["codebooks"]


def test_a_skipped_step_moves_no_codebook(ranks, small_corpus, tmp_path):
    """The loss alone is poisoned: what the codebooks saw is as good as in any step."""
    every = [*TINY, "train.train_iters=6", "train.nan_policy=skip", f"data.path={small_corpus}"]
    every += ["parallel.expert_model_parallel_size=2"]
    codebooks = {}
    for last in (2, 3):
        where = [f"train.output_dir={tmp_path / str(last)}", f"train.exit_interval={last}"]
        results = ranks(2).run(
            train_with_one_poisoned_step, str(PARITY), [*every, *where], layout=EP2
        )
        assert [result["skipped"] for result in results] == [last - 2] * 2
        codebooks[last] = [result["codebooks"] for result in results]
    assert codebooks[2] == codebooks[3]


def test_stop_names_the_samples_and_every_rank_agrees(ranks, small_corpus, tmp_path):
    results = run_on(ranks(2), small_corpus, tmp_path, [*TINY, *EXPLODE], EP2)
    for result in results:
        assert result["error"] == (
            "iteration 3: non-finite loss or gradient on samples 8..11; train.nan_policy=stop"
        )
        assert result["finite_codebooks"]


def test_stop_ends_the_command_with_code_1_and_a_truthful_status(small_corpus, tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    where = [f"data.path={small_corpus}", f"train.output_dir={run_dir}"]
    process = start_vqmoe("pretrain", str(PARITY), *TINY, *EXPLODE, *where, log=log)
    assert process.wait(timeout=90) == 1
    status = read_status(run_dir)
    assert status.state == "failed"
    assert "samples 8..11" in status.reason
    assert "samples 8..11" in log.read_text()


@pytest.mark.full
def test_skipping_all_the_way_and_a_dead_mlflow_server_do_not_end_training(small_corpus, tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    where = [f"data.path={small_corpus}", f"train.output_dir={run_dir}", "train.nan_policy=skip"]
    where += ["tracking.mlflow=true", "tracking.mlflow_uri=http://127.0.0.1:9"]
    process = start_vqmoe("pretrain", str(PARITY), *TINY, *EXPLODE, *where, log=log)
    assert process.wait(timeout=120) == 0, log.read_text()[-3000:]
    assert read_status(run_dir).state == "completed"
    assert read_metrics(run_dir)[-1]["skipped_iterations"] == 7
    assert "mlflow" in log.read_text().lower()


def test_a_rollback_goes_on_behind_the_bad_batch(ranks, small_corpus, tmp_path):
    every = [*TINY, "train.train_iters=6", f"data.path={small_corpus}"]
    every += [f"train.output_dir={tmp_path}", "parallel.expert_model_parallel_size=2"]
    saving = [*every, "train.nan_policy=rollback", "checkpoint.save_interval=1"]
    saving += ["checkpoint.keep_last=9"]
    results = ranks(2).run(train_with_one_poisoned_step, str(PARITY), saving, layout=EP2)
    for result in results:
        assert (result["skipped"], result["iteration"], result["error"]) == (0, 6, "")
        assert result["passed_over"] == 4
        assert result["messages"][-1].startswith("rolled back to 2: iteration 3: non-finite loss")
    records = results[0]["records"]
    assert [record["iteration"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(record["loss"]) for record in records)
    bad = [json.loads(line) for line in (tmp_path / "bad_batches.jsonl").read_text().splitlines()]
    assert bad == [
        {
            "iteration": 3,
            "first_sample": 8,
            "last_sample": 11,
            "loss": "nan",
            "policy": "rollback",
        }
    ]
    # The schedule went back too, and the tracker of balance losses was emptied.
    plain = run_on(ranks(2), small_corpus, tmp_path / "plain", [*TINY, "train.train_iters=6"], EP2)[
        0
    ]["records"]
    assert [r["learning_rate"] for r in records] == [r["learning_rate"] for r in plain]
    assert max(r["moe/load_balancing_loss"] for r in records) < 1.5
    # A fresh process from the same checkpoint and data position trains on to the same bit.
    fresh = ranks(2).run(
        train_behind_a_bad_batch,
        str(PARITY),
        [*every, f"train.output_dir={tmp_path / 'fresh'}", "train.eval_iters=0"]
        + [f"checkpoint.load={tmp_path / 'checkpoints' / 'iter_0000002'}"],
        4,
        layout=EP2,
    )
    assert [r["loss"] for r in fresh[0]["records"]] == [r["loss"] for r in records[2:]]
    assert fresh[0]["codebooks"] == results[0]["codebooks"]
    # The samples of step 3 are not those of the run without the accident.
    assert records[1]["loss"] == plain[1]["loss"]
    assert records[2]["loss"] != plain[2]["loss"]


@pytest.mark.full
def test_a_rollback_that_does_not_help_ends_the_run(ranks, small_corpus, tmp_path):
    every = [*TINY, *EXPLODE, "train.nan_policy=rollback", "checkpoint.save_interval=1"]
    results = run_on(ranks(2), small_corpus, tmp_path, every, EP2)
    for result in results:
        assert "went back to" in result["error"] and "3 times before" in result["error"]
        assert sum("rolled back to 2" in message for message in result["messages"]) == 3
