"""The short kill test: every way to end a run once, then the same curve as if nothing happened.

``kill_rounds.py`` is the long one.
"""

from __future__ import annotations

import pytest
from kill_checks import curve_problems
from kill_rounds import ACTIONS, hit_rounds
from killed_run import KilledRun

from vqmoe_megatron.track.metrics_log import read_metrics

pytestmark = pytest.mark.distributed

EP2 = {"expert_model_parallel_size": 2}
NUM_ITERS = 44
MEMORY = [  # beside the codebook; its codes move, and are frozen in the middle of the hits
    "code_memory.num_rows=64",
    "code_memory.codes=embedding",
    "code_memory.num_codes=64",
    "code_memory.num_context_codes=12",
    "code_memory.layers=[1]",
    "code_memory.freeze_after_steps=16",
    "code_memory.exchange=rows",
    "code_memory.lr_mult=5",
]


@pytest.mark.full
def test_a_run_that_is_killed_again_and_again_is_the_run_that_was_left_alone(
    ranks, endurance_corpus, tmp_path
):
    from small_run import run_on  # on the path since kill_rounds is imported

    num_iters = f"train.train_iters={NUM_ITERS}"
    killed = KilledRun(tmp_path / "killed", endurance_corpus, 2, EP2, num_iters, *MEMORY)
    rounds = hit_rounds(killed, len(ACTIONS), seed=8, show=lambda row: print(row))
    assert [row.problems for row in rounds] == [[]] * len(ACTIONS), killed.log.read_text()[-3000:]
    assert sorted(row.action for row in rounds) == sorted(ACTIONS)
    assert {row.moment for row in rounds} >= {"start-up", "training"}  # seed 8 meets both
    assert killed.complete() == []
    assert killed.saves_in_progress() == []

    whole = run_on(ranks(2), endurance_corpus, tmp_path / "whole", killed.overrides, EP2)
    assert curve_problems(read_metrics(killed.dir), whole[0]["records"]) == []


def test_the_comparison_sees_one_bit_and_one_missing_iteration():
    whole = [{"iteration": 1, "loss": 2.0, "step_time_ms": 5.0}, {"iteration": 2, "loss": 1.5}]
    later = [{**whole[0], "step_time_ms": 9.0}, whole[1]]
    assert curve_problems(later, whole) == []
    assert "loss" in curve_problems([whole[0], {**whole[1], "loss": 1.5000000000000002}], whole)[0]
    assert "iterations" in curve_problems(whole[:1], whole)[0]
    assert "iterations" in curve_problems([*whole, whole[1]], whole)[0]
