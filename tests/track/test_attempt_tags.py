"""Each attempt has its own tags, from the launcher's environment and nothing else of it."""

from vqmoe_megatron.track.attempt_tags import attempt_tags


def test_tags_of_an_array_task_after_a_requeue():
    environment = {
        "SLURM_JOB_ID": "812",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_RESTART_COUNT": "1",
        "MLFLOW_TRACKING_PASSWORD": "s3cret",
    }
    tags = attempt_tags(2, {"from_iteration": 40}, environment)
    assert tags["attempt"] == "2" and tags["attempt/02/from_iteration"] == "40"
    assert tags["attempt/02/slurm_job_id"] == "812"
    assert tags["attempt/02/slurm_array_task_id"] == "3"
    assert tags["attempt/02/slurm_job_nodelist"] == "n[1-2]"
    assert tags["attempt/02/slurm_restart_count"] == "1"
    assert tags["attempt/02/started"].endswith("+00:00") and "attempt/02/host" in tags
    assert not any("s3cret" in text for text in tags.values())
    assert all(name == "attempt" or name.startswith("attempt/02/") for name in tags)
