"""What one attempt makes of its answers, of stop requests, and of a controller that is away."""

from __future__ import annotations

import json
import sys

import pytest
from shell_run import ROOT, bash, fake_command

FILES = ("slurm_world", "slurm_step", "slurm_requeue", "slurm_attempt")
RUNNING = "JobId=7 JobState=RUNNING Reason=None Requeue=1 Restarts=0 BatchFlag=1"


@pytest.fixture
def attempt(tmp_path):
    """``attempt(srun, record)``: train in a folder with fake Slurm commands; requeues are noted.

    ``vqmoe``: the command that answers, by default one that lets every attempt begin.
    """

    def run(
        srun: str,
        record: str = RUNNING,
        script: str = "train run pretrain",
        vqmoe: str = "vqmoe",
        **variables: str,
    ):
        (tmp_path / "run").mkdir()
        fake_command(tmp_path, "vqmoe", "echo begin 0 none")
        (tmp_path / "logs").mkdir()
        fake_command(tmp_path, "srun", srun)
        fake_command(tmp_path, "sleep", "exec /usr/bin/sleep 0.01")
        fake_command(
            tmp_path,
            "scontrol",
            f"[[ $1 != requeue ]] || {{ echo $2 >{tmp_path}/requeued; exit 0; }}\n"
            f"[[ -n '{record}' ]] || exit 1\necho '{record}'",
        )
        setting = (
            f"restart=0 logs=logs tasks=(-n1) rank=() beside=() vqmoe=({vqmoe})\n"
            "VQMOE_PREFLIGHT=${VQMOE_PREFLIGHT:-1} VQMOE_LAUNCHER=srun\n"
            "VQMOE_MAX_RESTARTS=9 VQMOE_MAX_IDLE_ATTEMPTS=3\n"
            "touch logs/preflight.log\n"
        )
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", **variables}
        return bash(setting + script, *FILES, cwd=tmp_path, **environment)

    return run


@pytest.mark.parametrize("code", [138, 143])  # USR1 and TERM, as Slurm sends them to steps alone
def test_a_stop_during_the_preflight_is_queued_again(attempt, tmp_path, code) -> None:
    done = attempt(f"exit {code}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "requeued").read_text() == "7\n"
    assert "queued again: told to stop before training" in done.stdout


def test_a_preflight_that_fails_is_not(attempt, tmp_path) -> None:
    """Where KillOnBadExit=1 is set srun would answer 143, as for a stop request."""
    done = attempt('[[ " $* " == *" --kill-on-bad-exit=0 "* ]] && exit 1; exit 143')
    assert done.returncode == 1 and not (tmp_path / "requeued").exists()
    assert "giving up: the preflight failed, nothing was trained" in done.stdout


def test_a_preflight_that_failed_because_the_job_is_requeued_already(attempt, tmp_path) -> None:
    done = attempt("exit 1", RUNNING.replace("RUNNING", "COMPLETING"))
    assert done.returncode == 0 and not (tmp_path / "requeued").exists()
    assert "Slurm itself ends this attempt (job state COMPLETING)" in done.stdout


def test_a_controller_that_does_not_answer_is_no_success(attempt, tmp_path) -> None:
    done = attempt("exit 138", record="")
    assert done.returncode == 1 and not (tmp_path / "requeued").exists()
    assert "giving up: Slurm's controller does not answer" in done.stdout


def test_the_log_of_the_rank_that_failed_is_shown(attempt, tmp_path) -> None:
    script = (
        "echo fine >logs/rank_0.log; echo 'error: no such corpus' >logs/rank_10.log\n"
        "echo later >>logs/rank_10.log; show_failed_rank"
    )
    done = attempt("exit 1", script=script)
    assert done.stdout == "logs/rank_10.log ends with:\nerror: no such corpus\nlater\n"


REAL = {"vqmoe": f"{sys.executable} -m vqmoe_megatron.cli", "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize(
    ("state", "code", "requeued", "said"),
    [
        ("completed", 0, False, "decision: done iteration 5: why"),
        ("requeue", 0, True, "queued again: iteration 0 -> 0: why"),
        ("failed", 1, False, "giving up: the run has state 'failed': why"),
    ],
)
def test_the_shell_obeys_what_vqmoe_attempt_decides(
    attempt, tmp_path, state, code, requeued, said
) -> None:
    """The rules themselves: tests/rundir/test_attempts.py."""
    status = json.dumps({"state": state, "iteration": 5, "reason": "why"})
    done = attempt(f"echo '{status}' >run/status.json; exit 9", VQMOE_PREFLIGHT="0", **REAL)
    assert done.returncode == code, done.stdout + done.stderr
    assert (tmp_path / "requeued").exists() == requeued
    assert said in done.stdout and "ranks ended (srun: 9)" in done.stdout
    assert (tmp_path / "run" / "slurm_attempts.tsv").read_text() == "7\t0\t0\n"


def test_an_attempt_that_must_not_begin_starts_no_step(attempt, tmp_path) -> None:
    script = "printf '7\\t0\\t0\\n' >run/slurm_attempts.tsv; restart=1 VQMOE_MAX_IDLE_ATTEMPTS=1\n"
    done = attempt("touch stepped", script=script + "train run pretrain", **REAL)
    assert done.returncode == 1 and not (tmp_path / "stepped").exists()
    assert done.stdout.startswith("giving up: 1 attempts of job 7 began at iteration 0")


@pytest.mark.parametrize("answer", ["exit 1", "echo an unknown answer", "exec /no/such/python"])
@pytest.mark.parametrize("asked", ["begin", "decide"])
def test_a_python_that_does_not_answer_ends_the_job_in_one_line(
    attempt, tmp_path, answer, asked
) -> None:
    fake_command(tmp_path, "broken", f"[[ $2 == {asked} ]] || exec vqmoe\n{answer}")
    done = attempt("exit 0", vqmoe="broken", VQMOE_PREFLIGHT="0")
    assert done.returncode == 1 and not (tmp_path / "requeued").exists()
    assert done.stdout.splitlines()[-1].startswith(
        f"giving up: no answer from 'broken attempt {asked}' (exit code "
    )


def test_a_job_that_slurm_ends_meanwhile_needs_no_answer(attempt, tmp_path) -> None:
    record = RUNNING.replace("RUNNING", "CANCELLED")
    done = attempt("exit 0", record, vqmoe="/no/such/python", VQMOE_PREFLIGHT="0")
    assert done.returncode == 0 and not (tmp_path / "requeued").exists()
    assert "Slurm itself ends this attempt (job state CANCELLED)" in done.stdout


def test_a_stop_request_does_not_end_the_process_that_decides(attempt, tmp_path) -> None:
    """Slurm sends it to every process of a batch step when the job is cancelled or preempted."""
    body = "kill -USR1 $$; kill -TERM $$; [[ $2 == begin ]] && echo begin 0 none || echo done well"
    fake_command(tmp_path, "told", body)
    done = attempt("exit 0", vqmoe="told", VQMOE_PREFLIGHT="0")
    assert done.returncode == 0 and done.stdout.endswith("decision: done well\n")


@pytest.mark.parametrize(
    ("kind", "start"),
    [
        ("none", ""),
        ("apptainer", "apptainer exec"),
        ("docker", "docker run"),
        ("pyxis", "srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --container-image=image"),
    ],
)
def test_the_question_is_asked_where_the_package_is(attempt, tmp_path, kind, start) -> None:
    """In the job's container; as a step, which counts, only where it has no command of its own."""
    for name in ("apptainer", "docker"):
        fake_command(tmp_path, name, f"echo {name} $* >{tmp_path}/asked; echo begin 0 none")
    script = f"""
source '{ROOT}/launchers/slurm.sh'
start_job '{ROOT}' >/dev/null
ask_attempt begin run --job 7
echo "$answer, $num_steps steps"
"""
    variables = {
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "n1",
        "VQMOE_MASTER_ADDR": "127.0.0.1",
        "VQMOE_CONTAINER": kind,
        "VQMOE_IMAGE": "image",
        "PYTHON": "vqmoe",
    }
    srun = f"echo srun $* >{tmp_path}/asked; echo begin 0 none"
    done = attempt(srun, script=script, **variables)
    assert done.stdout == f"begin 0 none, {int(kind == 'pyxis')} steps\n", done.stderr
    if start:
        asked = (tmp_path / "asked").read_text()
        assert asked.startswith(start)
        assert asked.endswith("vqmoe -m vqmoe_megatron.cli attempt begin run --job 7\n")
