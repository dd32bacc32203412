"""One run of a study: what it becomes, and what it refuses before any work."""

from __future__ import annotations

import pytest

from vqmoe_megatron.study.study import load_study
from vqmoe_megatron.study.study_task import launched_ranks, pretrain_arguments


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"WORLD_SIZE": "4", "RANK": "1"}, 4),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_ID": "0"}, 8),
        ({"SLURM_NTASKS": "8"}, None),  # sbatch's own script, outside srun
    ],
)
def test_a_launched_world_is_recognised(environ, expected) -> None:
    assert launched_ranks(environ) == expected


def test_it_becomes_pretrain_with_the_runs_overrides(write_study) -> None:
    study = load_study(write_study())
    run = study.runs[3]
    own = pretrain_arguments(study, run, is_launched=False)
    assert own == ["pretrain", str(study.file.recipe), "--nproc", "1", *run.overrides]
    joined = pretrain_arguments(study, run, is_launched=True)
    assert joined == ["pretrain", str(study.file.recipe), *run.overrides]


def test_it_stands_under_the_parent_that_the_study_has(write_study) -> None:
    more = ["tracking.mlflow=true", "tracking.mlflow_uri=sqlite:///x.db"]
    study = load_study(write_study(more=more))
    study.start()
    study.folder.mlflow_parent.write_text('{"uri": "sqlite:///x.db", "run_id": "abc"}')
    assert pretrain_arguments(study, study.runs[0], False)[-1] == "tracking.parent_run_id=abc"
    study.folder.mlflow_parent.write_text("{}")
    with pytest.raises(ValueError, match="mlflow_parent.json is damaged"):
        pretrain_arguments(study, study.runs[0], False)


def test_another_number_of_ranks_is_refused(write_study, vqmoe, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "2")
    path = write_study()
    monkeypatch.setenv("SLURM_STEP_ID", "0")  # after the fixture took it away
    code, shown = vqmoe("study", "task", path, "--index", "0")
    assert code == 2 and "needs 1 ranks, but 2 were started" in shown


def test_a_study_is_not_run_by_every_rank_of_a_world(write_study, vqmoe, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, shown = vqmoe("study", "run", write_study())
    assert code == 2 and "started as 2 ranks" in shown


def test_an_index_past_the_study_is_one_line(write_study, vqmoe) -> None:
    for command in ("task", "path"):
        code, shown = vqmoe("study", command, write_study(), "--index", "4")
        assert code == 2 and len(shown.splitlines()) == 1
        assert "it has 4 runs, indices 0 to 3" in shown
