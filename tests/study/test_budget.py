"""Equal tokens and equal FLOPs, computed and not just stated."""

from __future__ import annotations

import pytest

from vqmoe_megatron.study.budget import flops_per_token
from vqmoe_megatron.study.planned_run import StudyPlanner
from vqmoe_megatron.study.study_file import read_study_file


def planned(path):
    return StudyPlanner(read_study_file(path)).plan_all()


def test_equal_tokens_shortens_runs_of_larger_steps(write_study) -> None:
    grid = {"train.global_batch_size": [4, 8, 2], "model.seq_length": [16, 32]}
    runs = planned(write_study(grid=grid))
    assert {run.num_tokens for run in runs} == {8 * 4 * 16}
    assert [run.config.train.train_iters for run in runs] == [8, 4, 4, 2, 16, 8]


def test_as_written_takes_lengths_from_the_grid(write_study) -> None:
    grid = {"train.train_iters": [6, 12]}
    runs = planned(write_study(grid=grid, study={"rule": "as_written"}))
    assert [run.config.train.train_iters for run in runs] == [6, 12]


def test_equal_flops_gives_every_run_the_same_operations(write_study) -> None:
    shapes = {"small": [], "wide": ["model.moe_ffn_hidden_size=256"], "two": ["model.num_layers=4"]}
    path = write_study(
        study={"rule": "equal_flops"}, more=["train.train_iters=4000"], grid={"shape": shapes}
    )
    runs = planned(path)
    flops = [run.num_tokens * flops_per_token(run.config, run.num_ranks) for run in runs]
    iterations = [run.config.train.train_iters for run in runs]
    assert iterations[0] == 4000 and iterations[1] < 3600 and iterations[2] < 3600
    assert max(flops) / min(flops) - 1 < 1e-3  # half a step of a few thousand


def test_equal_flops_takes_its_budget_on_the_ranks_of_the_study(write_study) -> None:
    path = write_study(
        study={"rule": "equal_flops", "num_ranks": 2},
        more=["train.global_batch_size=3", "train.micro_batch_size=1"],  # legal on one rank only
        grid={"batch": {"four": ["train.global_batch_size=4"]}},
    )
    with pytest.raises(ValueError, match="takes its budget from the recipe with `set` alone"):
        planned(path)
    path = write_study(study={"rule": "equal_flops", "num_ranks": 2}, grid={"seed": [1]})
    assert planned(path)[0].config.train.train_iters == 8


def test_equal_flops_needs_a_legal_budget(write_study) -> None:
    path = write_study(
        study={"rule": "equal_flops"},
        more=["parallel.expert_model_parallel_size=3"],
        grid={"layout": {"ep1": ["parallel.expert_model_parallel_size=1"]}},
    )
    with pytest.raises(ValueError, match="takes its budget from the recipe with `set` alone"):
        planned(path)


def test_whole_steps_that_cannot_keep_equal_flops_are_refused(write_study) -> None:
    grid = {"train.global_batch_size": [8, 16, 64]}
    study, base = {"rule": "equal_flops"}, ["train.global_batch_size=8"]
    with pytest.raises(ValueError) as refused:
        planned(write_study(study=study, more=[*base, "train.train_iters=3"], grid=grid))
    said = str(refused.value)
    assert "global_batch_size8" not in said  # three of its own steps are the budget
    assert "global_batch_size16: equal_flops cannot be kept in whole steps" in said  # 1.5 steps
    assert "so 0.375 steps; the nearest whole number, 1, is off by +166.7%, more than 2%" in said
    assert "train.train_iters in the recipe" in said and "200 are enough" in said
    assert said.rstrip().endswith("or take rule: as_written")
    runs = planned(write_study(study=study, more=[*base, "train.train_iters=200"], grid=grid))
    assert [run.config.train.train_iters for run in runs] == [200, 100, 25]


def test_equal_tokens_may_be_missed_by_two_percent_and_no_more(write_study) -> None:
    grid = {"train.global_batch_size": [8]}  # half the budget's steps, which are of 4 samples
    (run,) = planned(write_study(grid=grid, more=["train.train_iters=51"]))
    assert run.config.train.train_iters == 26  # for 25.5
    refusal = "budget is 49 steps x 64 = 3,136 tokens, one step of this run takes 128, so 24.5"
    with pytest.raises(ValueError, match=refusal):
        planned(write_study(grid=grid, more=["train.train_iters=49"]))
