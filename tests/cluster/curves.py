"""What a disturbed run must have in common with an undisturbed one, in file and in MLflow."""

from __future__ import annotations

from pathlib import Path

from slurm_job import NUM_ITERS, Job

from vqmoe_megatron.metrics.table import SINCE_START_METRICS

# What a clock or the machine says is never the same.
MEASURED = ("second", "_ms", "bytes", "overhead")


def computed(row: dict) -> dict:
    """The part of a metrics row that is arithmetic."""
    return {
        name: value
        for name, value in row.items()
        if not any(m in name for m in MEASURED) and not name.endswith(SINCE_START_METRICS)
    }


def assert_same_curve(job: Job, reference: Job) -> None:
    """Every iteration once, every computed number bitwise the same."""
    ours, theirs = job.metrics(), reference.metrics()
    assert [row["iteration"] for row in ours] == list(range(1, NUM_ITERS + 1))
    assert "loss" in ours[0] and "grad_norm" in ours[0]
    assert [computed(row) for row in ours] == [computed(row) for row in theirs]


def assert_one_whole_mlflow_run(job: Job, store: Path) -> None:
    """One finished run; of every iteration one loss, the one of metrics.jsonl."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{store}")
    runs = [
        run
        for experiment in client.search_experiments()
        for run in client.search_runs([experiment.experiment_id])
    ]
    assert len(runs) == 1, f"{len(runs)} MLflow runs"
    assert runs[0].info.status == "FINISHED"
    history = client.get_metric_history(runs[0].info.run_id, "loss")
    logged = sorted((metric.step, metric.value) for metric in history)
    assert logged == [(row["iteration"], row["loss"]) for row in job.metrics()]
