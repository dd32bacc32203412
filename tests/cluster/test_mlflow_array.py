"""Eight array tasks that meet a fresh SQLite store in the same moment: none fails, none is lost."""

from __future__ import annotations

import shlex
import sys

from mlflow import MlflowClient
from slurm_job import ROOT, SMALL_EP4, Job, slurm

NUM_TASKS = 8
NUM_ITERS = 5


def test_eight_array_tasks_share_one_fresh_database(job_folder, job_corpus) -> None:
    folder = job_folder / "eight"
    folder.mkdir()
    keys = [key for key in SMALL_EP4 if "expert_model_parallel" not in key]
    keys += [f"data.path={job_corpus}", f"train.train_iters={NUM_ITERS}", "train.log_interval=1"]
    keys += ["tracking.mlflow=true", "checkpoint.save_interval=0", "optimizer.lr_warmup_iters=1"]
    train = [sys.executable, "-m", "vqmoe_megatron.cli", "pretrain"]
    train += [str(ROOT / "recipes" / "parity.yaml"), *keys]
    script = (  # every task waits for the eighth, so that all create the database
        "touch started_$SLURM_ARRAY_TASK_ID\n"
        f"until [ $(ls started_* | wc -l) = {NUM_TASKS} ]; do sleep 0.1; done\n"
        f"{shlex.join(train)} train.output_dir=task_$SLURM_ARRAY_TASK_ID"
    )
    number = slurm(
        "sbatch",
        "--parsable",
        f"--array=0-{NUM_TASKS - 1}",
        "--ntasks=1",
        f"--chdir={folder}",
        "--output=task_%a.out",
        f"--export=ALL,OMP_NUM_THREADS=1,PYTHONPATH={ROOT}",
        "--wrap",
        script,
    )
    tasks = [Job(folder, f"{number}_{index}") for index in range(NUM_TASKS)]
    logs = [folder / f"task_{index}.out" for index in range(NUM_TASKS)]
    states = [task.wait_end() for task in tasks]
    assert states == ["COMPLETED"] * NUM_TASKS, "\n".join(log.read_text()[-1500:] for log in logs)
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "vqmoe"]
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert sorted(runs) == [f"task_{index}" for index in range(NUM_TASKS)]
    for name, run in runs.items():
        assert run.info.status == "FINISHED"
        assert run.data.tags["attempt/01/slurm_array_task_id"] == name.removeprefix("task_")
        points = client.get_metric_history(run.info.run_id, "loss")
        assert [point.step for point in points] == list(range(1, NUM_ITERS + 1))
