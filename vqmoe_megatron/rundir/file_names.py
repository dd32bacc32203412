"""What the files of a run directory are called: one name each, for writers and readers alike."""

from __future__ import annotations

CONFIG_FILE = "run_config.yaml"  # the resolved recipe; every checkpoint holds a copy
STATUS_FILE = "status.json"
LOCK_FILE = ".lock"  # held by rank 0 of a run for its life
METRICS_FILE = "metrics.jsonl"
SYSTEM_METRICS_FILE = "system_metrics.jsonl"  # the machine's load, of the same form
BAD_BATCHES_FILE = "bad_batches.jsonl"  # one line for every step that was not finite
ROUTING_FILE = "routing.npz"  # expert load, code usage, row reads of the last logged steps
PLOT_FILES = tuple(
    f"plots/{name}.png"
    for name in ("loss", "expert_load", "code_usage", "combine_weights", "row_reads")
)
MLFLOW_FILE = "mlflow.json"
UPCYCLE_FILE = "upcycled_from.json"  # what a run that began as another model began from
CHECKPOINTS_DIR = "checkpoints"
TRACKER_FILE = "latest_checkpointed_iteration.txt"  # in it; Megatron's name
ATTEMPTS_FILE = "slurm_attempts.tsv"  # of a Slurm job; no run reads it
STOP_FILE, SAVE_FILE = "STOP", "SAVE"  # written by the user, read by the run

# What a run found out; without it the files that say which run it was mean little.
RECORDS = (METRICS_FILE, SYSTEM_METRICS_FILE, BAD_BATCHES_FILE, ROUTING_FILE, *PLOT_FILES)
# All that a run writes beside its checkpoints.
WRITTEN_FILES = (LOCK_FILE, STATUS_FILE, CONFIG_FILE, MLFLOW_FILE, *RECORDS)
