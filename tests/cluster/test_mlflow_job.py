"""``slurm/mlflow.sbatch``: a server as a job, found by the file that holds its address."""

from __future__ import annotations

import time

from slurm_job import ROOT, slurm, submit

FOLDER = "a server?%41#ü"  # none of it may stand in a URI as it is


def test_server_answers_at_the_address_it_wrote(job_folder) -> None:
    from mlflow import MlflowClient

    job = submit(job_folder, str(ROOT / "slurm" / "mlflow.sbatch"), FOLDER)
    address = job_folder / FOLDER / "uri"
    job.wait_until(address.exists, "serving")
    client = MlflowClient(tracking_uri=address.read_text().strip())
    run = client.create_run(client.create_experiment("from_a_job"))
    client.log_metric(run.info.run_id, "loss", 1.5, step=3)
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(3, 1.5)]
    client.log_text(run.info.run_id, "a note", "note.txt")
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["note.txt"]
    assert (job_folder / FOLDER / "mlflow.db").stat().st_size > 0
    assert list((job_folder / FOLDER / "artifacts").rglob("note.txt"))
    slurm("scancel", "--batch", "--signal=TERM", job.number)
    assert job.wait_end() == "COMPLETED"
    time.sleep(0.2)
    assert not address.exists()
