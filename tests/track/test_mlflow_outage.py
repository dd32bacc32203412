"""A real training run against a real server that refuses, dies and comes back, over a requeue.

One run through all of it, because every start of a server and of a run takes seconds.
"""

import os
import signal
import statistics

import pytest
from mlflow import MlflowClient
from mlflow_server import MlflowServer
from small_run import PARITY, TINY, start_vqmoe, wait_until

from vqmoe_megatron.rundir.status import read_status
from vqmoe_megatron.track.metrics_log import read_metrics
from vqmoe_megatron.track.mlflow.errors import MlflowUnavailable
from vqmoe_megatron.track.mlflow.sync import sync_run

# Steps trained twice have these from the first time; all other values are equal to the last bit.
ON_THE_CLOCK = ("tokens_per_second", "step_time_ms", "overhead_share", "memory/", "system/")
PATIENCE_S = 300  # a quiet machine needs a tenth of it
NOISE_RATIO = 4.0  # of 10 ms steps, machine busy or not; one that waits for a store takes seconds


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    from vqmoe_megatron.data.prepare import prepare_corpus

    out, text = tmp_path_factory.mktemp("corpus") / "corpus", PARITY.parents[1] / "LICENSE"
    prepare_corpus("text", out, [text], "byte", None, False, False)
    return out


def server_points(client, run_id):
    """(metric, step) -> every value the server has, for the whole run."""
    points = {}
    for name in client.get_run(run_id).data.metrics:
        for metric in client.get_metric_history(run_id, name):
            points.setdefault((name, metric.step), []).append(metric.value)
    return points


def logged_points(run_dir):
    records = read_metrics(run_dir) + read_metrics(run_dir / "system_metrics.jsonl")
    return {
        (name, record["iteration"]): float(value)
        for record in records
        for name, value in record.items()
        if name not in ("iteration", "timestamp_ms")
    }


def last_iteration(run_dir):
    path = run_dir / "metrics.jsonl"
    records = read_metrics(run_dir) if path.exists() else []
    return records[-1]["iteration"] if records else 0


def the_only_run(client):
    experiments = [found.experiment_id for found in client.search_experiments()]
    runs = client.search_runs(experiments)
    assert len(runs) <= 1, runs
    return runs[0] if runs else None


def last_step_there(uri):
    run = the_only_run(MlflowClient(uri))
    return max((metric.step for metric in run.data.to_proto().metrics), default=-1) if run else -1


def test_one_run_without_hole_or_duplicate_through_refusal_outage_and_kill(corpus, tmp_path):
    run_dir, log, server = tmp_path / "run", tmp_path / "log", MlflowServer(tmp_path)
    command = ["pretrain", str(PARITY), *TINY, "train.log_interval=1", "train.train_iters=100000"]
    command += [f"data.path={corpus}", f"train.output_dir={run_dir}", "tracking.mlflow=true"]
    command += [f"tracking.mlflow_uri={server.uri}", "checkpoint.save_interval=30"]
    process = None
    try:
        # 1. The server knows itself by another name and answers 403: one notice, with the remedy.
        server.start(allowed_hosts="tracking.example:*")
        process = start_vqmoe(*command, log=log)
        wait_until(lambda: last_iteration(run_dir) >= 20, process, log, PATIENCE_S)
        notices = [line for line in log.read_text().splitlines() if "403" in line]
        assert len(notices) == 1, notices
        assert f"--allowed-hosts 127.0.0.1:{server.port}" in notices[0]
        server.kill()

        # 2. Mended, it gets everything, from the first step on, while training goes on.
        server.start()
        reached = last_iteration(run_dir)
        wait_until(lambda: last_step_there(server.uri) > reached, process, log, PATIENCE_S)
        assert "answers again" in log.read_text()

        # 3. It dies; steps take what they took; the run is killed, too.
        began = last_iteration(run_dir)
        server.kill()
        saved = run_dir / "checkpoints" / "latest_checkpointed_iteration.txt"
        wait_until(
            lambda: saved.exists() and last_iteration(run_dir) >= began + 40,
            process,
            log,
            PATIENCE_S,
        )
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        times_ms = {r["iteration"]: r["step_time_ms"] for r in read_metrics(run_dir)[1:]}
        up = [ms for iteration, ms in times_ms.items() if iteration <= began]
        down = [ms for iteration, ms in times_ms.items() if iteration > began]
        ratio = statistics.median(down) / statistics.median(up)
        print(f"median step, server down / up: {ratio:.3f} ({len(down)} and {len(up)} steps)")
        assert ratio < NOISE_RATIO
        with pytest.raises(MlflowUnavailable, match="connection refused"):
            sync_run(run_dir, None)

        # 4. Server and run come back; the run goes on from its checkpoint and ends.
        server.start()
        start = int(saved.read_text())
        end = start + 30
        process = start_vqmoe(*command, f"train.exit_interval={end}", log=log)
        assert process.wait(timeout=PATIENCE_S) == 0, log.read_text()[-3000:]
        assert last_iteration(run_dir) == end

        # 5. One run that has every point of the log, each step once.
        client = MlflowClient(server.uri)
        run = the_only_run(client)
        assert run.info.run_id == read_status(run_dir).mlflow_run_id
        assert run.info.status == "FINISHED" and run.data.tags["attempt"] == "2"
        assert run.data.tags["attempt/02/from_iteration"] == str(start)
        there, logged = server_points(client, run.info.run_id), logged_points(run_dir)
        assert logged.keys() - there.keys() == set()
        assert {key: values for key, values in there.items() if len(values) != 1} == {}
        differing = {name for (name, step), value in logged.items() if there[name, step] != [value]}
        assert {name for name in differing if not name.startswith(ON_THE_CLOCK)} == set()
        result = sync_run(run_dir, None)
        assert (result.num_sent, result.num_files_sent, result.num_params_sent) == (0, 0, 0)

        # 6. The same directory, replayed into a fresh store, is the log to the last bit.
        other = f"sqlite:///{tmp_path}/other.db"
        replayed = sync_run(run_dir, other)
        copy = server_points(MlflowClient(other), replayed.run_id)
        assert copy == {key: [value] for key, value in logged.items()}
    finally:
        server.kill()
        if process is not None and process.poll() is None:
            process.kill()
            process.wait()
