"""How long the study may be, and what is told of its runs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from vqmoe_megatron.config import RunConfig, TrainConfig
from vqmoe_megatron.gpu_proof import study_run
from vqmoe_megatron.gpu_proof.part import Job
from vqmoe_megatron.gpu_proof.study_run import Pace, _tell, _write_study, pace_of, steps_within
from vqmoe_megatron.study.report.run_table import ReportedStudy, RunRow
from vqmoe_megatron.study.study import load_study


def test_the_pace_is_that_of_the_slowest_arm() -> None:
    def records(*step_ms: float) -> list[dict[str, float]]:
        steps = [{"iteration": 10 * (i + 1), "step_time_ms": t} for i, t in enumerate(step_ms)]
        return [{"iteration": 0, "val/loss": 5.0}, *steps]

    pace = pace_of([records(900.0, 100.0, 100.0), records(200.0, 200.0, 300.0)], 26.0)
    assert pace == Pace(start_seconds=20.0, step_seconds=0.2)


def test_steps_fill_what_is_left_behind_the_starts() -> None:
    pace = Pace(start_seconds=15.0, step_seconds=0.1)
    assert steps_within(300.0, pace, num_rounds=3) == 700  # (300 * 0.85 / 3 - 15) / 0.1
    assert steps_within(30.0, pace, num_rounds=3) == 0
    assert steps_within(1e6, pace, num_rounds=3) == 4000


@pytest.mark.parametrize("is_tiny", [True, False])
def test_the_study_file_plans_three_arms_under_every_seed(tmp_path: Path, is_tiny: bool) -> None:
    job = Job("study", "cpu", is_tiny, 100.0, tmp_path, tmp_path)
    study = load_study(_write_study(job, tmp_path / "corpus", "study", 200, (1, 2, 3)))
    runs = list(study.runs.values())
    assert len(runs) == 9
    assert {run.config.model.num_moe_experts for run in runs} == {64}
    assert len({run.num_tokens for run in runs}) == 1
    arms = {(run.config.code_memory.is_on, run.config.model.moe_router_topk) for run in runs}
    assert arms == {(False, 1), (False, 2), (True, 1)}


def told(tmp_path: Path, losses: dict[tuple[str, int], float]) -> Job:
    job = Job("study", "cpu", True, 100.0, tmp_path, tmp_path)
    rows = [
        RunRow(
            f"{arm}-{seed}",
            {"router": arm, "seed": seed},
            1,
            "finished",
            config=RunConfig(train=TrainConfig(seed=seed)),
            final_val_loss=loss,
        )
        for (arm, seed), loss in losses.items()
    ]
    _tell(job, ReportedStudy(tmp_path, "study", "equal_tokens", "CPU", rows), 3)
    return job


def losses_with() -> dict[tuple[str, int], float]:
    of_arm = {"smoe_top1": 2.0, "smoe_top2": 1.9, "vqmoe": 1.8}
    spread = {1: 0.0, 2: 0.5, 3: -0.5}  # of the seeds, which pairing takes out
    return {(arm, seed): loss + spread[seed] for arm, loss in of_arm.items() for seed in spread}


@pytest.mark.full
def test_a_calibration_sets_the_length(
    tmp_path: Path, small_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real commands, at the tiny model's size."""
    for name, value in {"FULL": study_run.TINY, "NUM_CALIBRATION_STEPS": 8, "NUM_JOBS": 2}.items():
        monkeypatch.setattr(study_run, name, value)
    job = Job("study", "cpu", False, 3000.0, tmp_path, tmp_path)
    num_steps = study_run._affordable_steps(job, small_corpus, 3)
    assert study_run.LEAST_STEPS <= num_steps <= study_run.MOST_STEPS
    assert job.findings.figures["calibrated_step_ms"] > 0
    job = Job("study", "cpu", False, 200.0, tmp_path / "second", tmp_path)
    job.work.mkdir()
    monkeypatch.setattr(study_run, "USED_SHARE", 1e-6)
    assert study_run._affordable_steps(job, small_corpus, 3) is None
    assert "the study: 0 steps would fit" in job.findings.left_out[0]


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    losses = losses_with()
    losses["vqmoe", 1] += 0.01
    losses["vqmoe", 2] -= 0.01
    job = told(tmp_path, losses)
    rows = next(rows for title, rows in job.findings.tables.items() if "paired" in title)
    first = rows[0]
    assert first["other"] == "smoe_top1" and first["pairs"] == 3
    assert first["mean"] == pytest.approx(-0.2)
    # differences -0.19, -0.21, -0.2: s = 0.01, t(2) = 4.303
    assert first["high"] - first["mean"] == pytest.approx(4.3027 * 0.01 / math.sqrt(3), rel=1e-3)
    assert job.findings.checks[-1]["passed"]


def test_a_run_without_a_loss_fails_the_check_and_leaves_its_pair_out(tmp_path: Path) -> None:
    losses = losses_with()
    losses["smoe_top1", 2] = math.nan
    job = told(tmp_path, losses)
    rows = next(rows for title, rows in job.findings.tables.items() if "paired" in title)
    assert [row["pairs"] for row in rows] == [2, 3]
    assert not job.findings.checks[-1]["passed"]
