"""What stands before a command in each kind of container."""

from __future__ import annotations

import pytest
from shell_run import bash

SHOW = 'printf "S %s\\n" "${container_srun_args[@]}"; printf "C %s\\n" "${container_command[@]}"'


def compose(tmp_path, *arguments: str, **environment: str):
    """Return (srun's options, the command's prefix)."""
    words = " ".join(f"'{argument}'" for argument in arguments)
    done = bash(f"compose_container {words}; {SHOW}", "container", cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return tuple([line[2:] for line in lines if line[0] == kind and line[2:]] for kind in "SC")


def test_none_stands_before_nothing(tmp_path) -> None:
    assert compose(tmp_path, "none", "", "8", "/data") == ([], [])


def test_pyxis_gives_options_to_srun(tmp_path) -> None:
    srun, command = compose(tmp_path, "pyxis", "site#vqmoe:1", "8", "/data", "/a b:/c")
    assert command == []
    assert srun == [
        "--container-image=site#vqmoe:1",
        f"--container-workdir={tmp_path}",
        "--container-mounts=/data:/data,/a b:/c",
    ]


@pytest.mark.parametrize(("num_gpus", "gpu_options"), [("0", []), ("8", ["--nv"])])
def test_apptainer(tmp_path, num_gpus, gpu_options) -> None:
    srun, command = compose(tmp_path, "apptainer", "vqmoe.sif", num_gpus, "/data")
    assert srun == []
    middle = [*gpu_options, "--bind", "/data:/data"]
    assert command == ["apptainer", "exec", "--pwd", str(tmp_path), *middle, "vqmoe.sif"]


def test_docker_passes_ranks_network_and_user(tmp_path) -> None:
    _, command = compose(
        tmp_path,
        "docker",
        "vqmoe:1",
        "2",
        "/data",
        SLURM_JOB_NUM_NODES="1",
        NCCL_DEBUG="WARN",
        SECRET_TOKEN="x",
    )
    assert command[:2] == ["docker", "run"]
    assert command[-3:] == ["--entrypoint", "/usr/bin/env", "vqmoe:1"]
    pairs = list(zip(command, command[1:], strict=False))
    assert ("--network", "host") in pairs and ("--gpus", "all") in pairs
    assert ("--volume", "/data:/data") in pairs and ("--workdir", str(tmp_path)) in pairs
    variables = [value for option, value in pairs if option == "--env"]
    assert {"SLURM_PROCID", "SLURM_STEP_ID", "NCCL_DEBUG"} <= set(variables)
    assert "SECRET_TOKEN" not in variables and "PATH" not in variables


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["podman", "x", "0"], {}, "VQMOE_CONTAINER=podman is not one of none, pyxis"),
        (["pyxis", "", "0"], {}, "VQMOE_CONTAINER=pyxis needs an image: set VQMOE_IMAGE"),
        (["apptainer", "x", "0", "data"], {}, "must be PATH, OUTSIDE:INSIDE or"),
        (["pyxis", "x", "0", "/a,b"], {}, "must not contain a comma"),
        (["docker", "x", "0", "/a:b:/c"], {}, "absolute, without colons"),
        (["docker", "x", "0"], {"SLURM_JOB_NUM_NODES": "2"}, "docker is for one node, not 2"),
    ],
)
def test_what_is_refused(tmp_path, arguments, environment, message) -> None:
    words = " ".join(f"'{argument}'" for argument in arguments)
    done = bash(f"compose_container {words}", "container", cwd=tmp_path, **environment)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
