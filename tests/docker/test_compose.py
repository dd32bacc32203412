"""docker/compose.yaml: legal, healthy only when it serves clients, and without a password in it."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from vqmoe_megatron.config.recipe import load_recipe

REPOSITORY = Path(__file__).parents[2]
COMPOSE = REPOSITORY / "docker" / "compose.yaml"
PASSWORDS = ("MLFLOW_ADMIN_PASSWORD", "MLFLOW_SECRET_KEY")


@pytest.fixture(scope="module")
def services() -> dict:
    return yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]


def compose_command() -> list[str]:
    """Return a Docker Compose v2 that is here, as a plugin or on its own; else skip."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]):
            found = subprocess.run([*command, "version", "--short"], capture_output=True, text=True)
            if found.returncode == 0 and found.stdout.strip().lstrip("v")[0] >= "2":
                return command
    pytest.skip("Docker Compose v2 is not installed")


def run_config(**passwords: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in PASSWORDS} | passwords
    return subprocess.run(
        [*compose_command(), "--env-file", os.devnull, "-f", COMPOSE, "config", "--quiet"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_docker_compose_accepts_it():
    done = run_config(MLFLOW_ADMIN_PASSWORD="a", MLFLOW_SECRET_KEY="b")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("missing", PASSWORDS)
def test_docker_compose_refuses_a_missing_password(missing):
    given = {name: "a" for name in PASSWORDS if name != missing}
    done = run_config(**given)
    assert done.returncode != 0
    assert f"{missing} is missing a value: set it in docker/.env" in done.stderr


def test_no_password_is_written_down(services):
    secret = re.compile(r"PASSWORD|SECRET|TOKEN")
    settings = [
        (name, value)
        for service in services.values()
        for name, value in service.get("environment", {}).items()
        if secret.search(name)
    ]
    assert len(settings) == 3
    for name, value in settings:
        assert re.fullmatch(r"\$\{MLFLOW_\w+:\?[^}]*docker/\.env[^}]*\}", value), name
    assert ".env" in (COMPOSE.parent / ".gitignore").read_text(encoding="utf-8").split()


def test_server_is_authenticated_and_answers_the_names_its_clients_use(services):
    options = dict(
        option.removeprefix("--").split("=", 1) for option in services["mlflow"]["command"]
    )
    assert services["mlflow"]["entrypoint"] == ["mlflow", "server"]
    assert options["app-name"] == "basic-auth"
    uri = next(word for word in services["smoke"]["command"] if "mlflow_uri=" in word)
    allowed = options["allowed-hosts"].split(",")
    assert uri.removeprefix("tracking.mlflow_uri=http://") in allowed
    published = services["mlflow"]["ports"]
    assert published == ["127.0.0.1:5000:5000"] and "127.0.0.1:5000" in allowed


def test_health_is_asked_as_a_client_and_waited_for(services):
    check = services["mlflow"]["healthcheck"]
    *command, script, url = check["test"]
    assert command == ["CMD", "python"] and url == "http://mlflow:5000"
    assert script == "/opt/vqmoe/bin/mlflow_health.py"
    assert f"COPY docker/mlflow_health.py {script}" in (COMPOSE.parent / "Dockerfile").read_text()
    waits = services["smoke"]["depends_on"]
    assert waits["mlflow"] == {"condition": "service_healthy"}
    assert waits["prepare"] == {"condition": "service_completed_successfully"}


def test_smoke_job_is_a_legal_short_run(services):
    command, recipe, *words = services["smoke"]["command"]
    assert command == "pretrain"
    overrides = [word for word in words if not word.startswith("--")]
    config = load_recipe(REPOSITORY / recipe, overrides)
    assert config.train.train_iters == 10
    assert config.tracking.mlflow_uri == "http://mlflow:5000"
    assert services["prepare"]["command"][-1] == config.data.path


def test_services_share_one_image_and_gain_no_rights(services):
    for name, service in services.items():
        assert service["image"] == "vqmoe:cpu", name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "user" not in service and "privileged" not in service, name
