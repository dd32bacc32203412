"""A job's tasks, ranks and meeting place, from Slurm's variables."""

from __future__ import annotations

import pytest
from shell_run import ROOT, bash, fake_command

SHOW = 'echo "$world_size" "${tasks[*]}"'
JOB = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n[1-2]", "VQMOE_LAUNCHER": "srun"}


def find_world(**environment: str):
    variables = {**JOB, "SLURM_JOB_NUM_NODES": "2", **environment}
    return bash(f"find_world; {SHOW}", "slurm_world", **variables)


@pytest.mark.parametrize(
    ("environment", "answer"),
    [
        ({}, "2 --ntasks=2 --ntasks-per-node=1"),
        # sbatch -N 2 --exclusive without tasks: the variable holds the CPUs, not what was asked
        ({"SLURM_TASKS_PER_NODE": "96(x2)"}, "2 --ntasks=2 --ntasks-per-node=1"),
        ({"SLURM_NTASKS_PER_NODE": "4"}, "8 --ntasks=8 --ntasks-per-node=4"),
        (
            {"SLURM_NTASKS": "4", "SLURM_TASKS_PER_NODE": "2(x2)"},
            "4 --ntasks=4 --ntasks-per-node=2",
        ),
        ({"SLURM_NTASKS": "4", "SLURM_TASKS_PER_NODE": "3,1"}, "4 --ntasks=4"),
        # beside --ntasks, --ntasks-per-node is the most that a node takes
        (
            {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "8", "SLURM_TASKS_PER_NODE": "2(x2)"},
            "4 --ntasks=4 --ntasks-per-node=2",
        ),
        (
            {"SLURM_NTASKS": "16", "SLURM_NTASKS_PER_NODE": "8", "SLURM_TASKS_PER_NODE": "8(x2)"},
            "16 --ntasks=16 --ntasks-per-node=8",
        ),
        (
            {"SLURM_NTASKS_PER_NODE": "8", "SLURM_GPUS_ON_NODE": "8"},
            "16 --ntasks=16 --ntasks-per-node=8",
        ),
        (
            {"VQMOE_LAUNCHER": "torchrun", "SLURM_GPUS_ON_NODE": "8"},
            "16 --ntasks=2 --ntasks-per-node=1",
        ),
        (
            {"VQMOE_LAUNCHER": "torchrun", "VQMOE_RANKS_PER_NODE": "3"},
            "6 --ntasks=2 --ntasks-per-node=1",
        ),
    ],
)
def test_world(environment, answer) -> None:
    done = find_world(**environment)
    assert done.stdout.strip() == answer, done.stderr


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SLURM_GPUS_ON_NODE": "8"}, "tasks per node = GPUs per node fails: 1 != 8; sbatch"),
        (
            {"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "4"},
            "tasks per node = GPUs per node fails: 4 != 8",
        ),
        (
            {"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS": "9", "SLURM_TASKS_PER_NODE": "8,1"},
            "tasks per node = GPUs per node fails: uneven != 8",
        ),
        (
            {"VQMOE_LAUNCHER": "torchrun", "SLURM_NTASKS_PER_NODE": "8"},
            "tasks per node = 1 fails: 8",
        ),
        *(
            (
                {"VQMOE_LAUNCHER": "torchrun", "VQMOE_RANKS_PER_NODE": number},
                f"VQMOE_RANKS_PER_NODE={number} is no number of ranks",
            )
            for number in ("0", "-1", "two", "8.0")
        ),
        ({"VQMOE_LAUNCHER": "mpirun"}, "VQMOE_LAUNCHER=mpirun is not one of srun, torchrun"),
    ],
)
def test_refused_world(environment, message) -> None:
    done = find_world(**environment)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.fixture
def meet(tmp_path):
    """``meet(nodes, resolves, **environment)`` with fake scontrol and getent."""

    def run(nodes: str, resolves: bool = True, address: str = "10.0.0.7", **environment: str):
        show = f"NodeName=x Arch=x86_64\n   NodeAddr={address} NodeHostName=x" if address else "x"
        body = f"[[ $2 == hostnames ]] && printf '%b' '{nodes}' || printf '%s' '{show}'"
        fake_command(tmp_path, "scontrol", body)
        fake_command(tmp_path, "getent", "exit 0" if resolves else "exit 2")
        script = 'find_meeting_place; echo "$MASTER_ADDR $MASTER_PORT [$VQMOE_NODES]"'
        path = f"{tmp_path}:/usr/bin:/bin"
        return bash(script, "slurm_world", **{**JOB, "PATH": path, **environment})

    return run


def test_first_node_is_the_meeting_place(meet) -> None:
    assert meet("n1\\nn2\\n").stdout == "n1 20192 [n1 n2 ]\n"


def test_ports_differ_between_jobs_and_restarts(meet) -> None:
    ports = {
        meet("n1\\n", SLURM_JOB_ID=str(job), SLURM_RESTART_COUNT=str(restart)).stdout.split()[1]
        for job in (12, 13, 700)
        for restart in (0, 1, 2)
    }
    assert len(ports) == 9 and all(20000 <= int(port) < 32768 for port in ports)


def test_a_node_without_a_name_is_met_at_its_address_and_says_so(meet) -> None:
    done = meet("n1\\nn2\\n", resolves=False)
    assert "MASTER_ADDR: n1 does not resolve here, using its NodeAddr 10.0.0.7" in done.stdout
    assert "10.0.0.7 20192" in done.stdout


def test_the_user_may_name_the_place(meet) -> None:
    assert meet("n1\\n", VQMOE_MASTER_ADDR="ib-n1").stdout.startswith("ib-n1 ")


@pytest.mark.parametrize("text", ["[fd00::2]", "fd00::2"])
def test_an_ipv6_address_is_taken_with_or_without_brackets(meet, text) -> None:
    assert meet("n1\\n", VQMOE_MASTER_ADDR=text).stdout.startswith("fd00::2 ")


@pytest.mark.parametrize("kind", ["hostnames", "node"])
def test_a_scontrol_that_fails_does_not_end_the_job_without_a_word(tmp_path, kind) -> None:
    fake_command(tmp_path, "scontrol", f"[[ $2 == {kind} ]] && exit 1; echo n1")
    fake_command(tmp_path, "getent", "exit 2")
    environment = {**JOB, "PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = bash("find_meeting_place", "slurm_world", **environment)
    assert done.returncode == 2 and done.stderr.startswith("error: MASTER_ADDR")


@pytest.mark.parametrize(
    ("nodes", "resolves", "message"),
    [
        ("", True, "MASTER_ADDR is empty: 'scontrol show hostnames n[1-2]' named no node"),
        ("n1\\n", False, "MASTER_ADDR=n1 does not resolve, and Slurm knows no NodeAddr for it"),
    ],
)
def test_no_meeting_place_is_one_clear_error(meet, nodes, resolves, message) -> None:
    done = meet(nodes, resolves=resolves, address="")
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"VQMOE_MAX_RESTARTS": "fifty"}, "VQMOE_MAX_RESTARTS=fifty is not a whole number"),
        ({"VQMOE_CONTAINER": "docker", "VQMOE_LAUNCHER": "torchrun"}, "use VQMOE_LAUNCHER=srun"),
    ],
)
def test_a_job_that_could_not_be_stopped_or_bounded_does_not_start(environment, message) -> None:
    done = bash(f"start_job '{ROOT}'", "slurm", **{**JOB, **environment})
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


def test_an_array_task_is_named_by_its_array() -> None:
    array = {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_ID": "43"}
    assert bash("job_name", "slurm_world", **array).stdout == "40_3\n"
    assert bash("job_name", "slurm_world", SLURM_JOB_ID="43").stdout == "43\n"


def test_site_profiles(tmp_path) -> None:
    (tmp_path / "slurm" / "sites").mkdir(parents=True)
    (tmp_path / "slurm" / "sites" / "here.sh").write_text("export COLOUR=${COLOUR:-site}\n")
    (tmp_path / "slurm" / "env.sh").write_text("export COLOUR=${COLOUR:-env} SHAPE=${SHAPE:-env}\n")
    script = f"load_site '{tmp_path}' >/dev/null; echo $COLOUR $SHAPE"

    def colours(**environment: str) -> str:
        return bash(script, "slurm_world", **environment).stdout.strip()

    assert colours() == "env env"
    assert colours(SLURM_CLUSTER_NAME="unknown") == "env env"
    assert colours(SLURM_CLUSTER_NAME="here") == "site env"
    assert colours(VQMOE_SITE="here", SHAPE="mine") == "site mine"
    refused = bash(script, "slurm_world", VQMOE_SITE="nowhere")
    assert refused.returncode == 2 and "there are here.sh" in refused.stderr


def test_what_sbatch_was_told_to_export_does_not_hold_for_the_ranks() -> None:
    """--export=NONE and --export=NAME,... reach srun as variables, and would hold for the ranks."""
    script = f"load_site '{ROOT}' >/dev/null; compgen -e | grep EXPORT_ENV || echo none"
    for value in ("NONE", "HOME,PATH", "ALL"):
        environment = {"SLURM_EXPORT_ENV": value, "SRUN_EXPORT_ENV": value}
        assert bash(script, "slurm_world", **environment).stdout == "none\n"
