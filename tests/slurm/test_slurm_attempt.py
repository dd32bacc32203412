"""What one attempt makes of a stop request before training, and of a controller that is away."""

from __future__ import annotations

import pytest
from shell_run import bash, fake_command

FILES = ("slurm_world", "slurm_step", "requeue_guard", "slurm_requeue", "slurm_attempt")
RUNNING = "JobId=7 JobState=RUNNING Reason=None Requeue=1 Restarts=0 BatchFlag=1"


@pytest.fixture
def attempt(tmp_path):
    """``attempt(srun, record)``: train in a folder with fake Slurm commands; requeues are noted."""

    def run(srun: str, record: str = RUNNING, script: str = "train run pretrain"):
        (tmp_path / "run").mkdir()
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
            "restart=0 logs=logs tasks=(-n1) rank=() vqmoe=(vqmoe)\n"
            "VQMOE_PREFLIGHT=1 VQMOE_MAX_RESTARTS=9 VQMOE_MAX_IDLE_ATTEMPTS=3 VQMOE_LAUNCHER=srun\n"
            "touch logs/preflight.log\n"
        )
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
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
