"""Where a rollback goes on, without training anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vqmoe_megatron.checkpoint.state import Progress
from vqmoe_megatron.train.bad_batches import (
    MAX_ROLLBACKS,
    BadBatch,
    after_the_bad_batch,
    check_rollback,
    record_bad_batch,
)


def test_the_data_goes_on_behind_the_bad_batch_also_the_second_time(tmp_path):
    checkpoint = Progress(iteration=10, consumed_samples=40, skipped_iterations=0)
    first = BadBatch.of(Progress(14, 56, 0), 4, float("nan"), "rollback")
    assert (first.iteration, first.first_sample, first.last_sample) == (15, 56, 59)
    again = after_the_bad_batch(checkpoint, first, "run")
    assert (again.iteration, again.consumed_samples, again.mlflow_run_id) == (10, 40, "run")
    assert again.consumed_samples + again.passed_over_samples == 60
    # Two steps on, the next bad batch is counted from there.
    step = Progress(12, 48, 0, passed_over_samples=again.passed_over_samples)
    second = BadBatch.of(step, 4, float("inf"), "rollback")
    assert (second.first_sample, second.last_sample) == (68, 71)
    assert after_the_bad_batch(checkpoint, second, "run").passed_over_samples == 72 - 40
    for bad in (first, second):
        record_bad_batch(tmp_path / "bad.jsonl", bad)
    lines = (tmp_path / "bad.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == ["nan", "inf"]


def test_going_back_is_bounded_by_checkpoint_and_needs_one():
    bad = BadBatch(15, 56, 59, "nan", "rollback")
    with pytest.raises(FloatingPointError, match="no checkpoint yet"):
        check_rollback(bad, None, {})
    counts: dict[int, int] = {}
    for _ in range(MAX_ROLLBACKS):
        check_rollback(bad, Path("iter_0000010"), counts)
    check_rollback(bad, Path("iter_0000020"), counts)
    with pytest.raises(FloatingPointError, match="iter_0000010 3 times before"):
        check_rollback(bad, Path("iter_0000010"), counts)
