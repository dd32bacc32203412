"""The supported range, the message outside of it, and what differs between Megatron's releases."""

from __future__ import annotations

import configparser
import importlib.machinery
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vqmoe_megatron.runtime import versions
from vqmoe_megatron.runtime.versions import MEGATRON_CORE, TORCH, is_supported

ROOT = Path(__file__).resolve().parents[2]


def requirements(section: str, key: str) -> list[str]:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    lines = parser[section][key].splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_setup_cfg_states_the_same_ranges_and_never_asks_for_torch() -> None:
    required = requirements("options", "install_requires")
    assert MEGATRON_CORE.requirement in required
    assert not [line for line in required if line.startswith("torch")]
    assert requirements("options.extras_require", "torch") == [TORCH.requirement]


@pytest.mark.parametrize(
    ("supported", "version", "expected"),
    [
        (TORCH, "2.11.0", True),
        (TORCH, "2.11.0+cu130", True),
        (TORCH, "2.11.0a0+eb65b36914.nv26.02", True),  # NVIDIA's images: before the release
        (TORCH, "2.13.0+cpu", True),
        (TORCH, "2.10.1+cu128", False),
        (TORCH, "2.14.0", False),
        (TORCH, "2.14.0.dev20261101", False),
        (TORCH, "of unknown version", False),
        (MEGATRON_CORE, "0.16.0", False),
        (MEGATRON_CORE, "0.16.1", True),
        (MEGATRON_CORE, "0.17.0rc0", True),
        (MEGATRON_CORE, "0.19.2", True),
        (MEGATRON_CORE, "0.20.0", False),
        (MEGATRON_CORE, "1.0", False),
    ],
)
def test_release_numbers_decide(supported, version: str, expected: bool) -> None:
    assert is_supported(supported, version) is expected


def test_what_is_here_is_found_without_importing_it_and_supported() -> None:
    program = (
        "import sys\n"
        "from vqmoe_megatron.runtime.versions import *\n"
        "check_versions()\n"
        "print(supported_version(TORCH), supported_version(MEGATRON_CORE))\n"
        "assert not {'torch', 'megatron.core'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    import megatron.core

    assert done.stdout.split() == [torch.__version__, megatron.core.__version__]


def put_package(folder: Path, module: str, file: str, version: str) -> None:
    package = folder.joinpath(*module.split("."))
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('imported')\n")
    (package / file).write_text(f"__version__ = {version!r}\n")


RECIPE = str(ROOT / "recipes" / "quickstart.yaml")


@pytest.mark.parametrize(
    "command",
    [
        ["pretrain", RECIPE, "train.output_dir=run"],
        ["preflight", RECIPE, "--world-size", "2", "train.output_dir=run"],
        ["preflight", "--run-dir", "run"],
        ["export", "run", "--tables", "run"],
        ["bench", "layer", "--num-experts", "4", "--num-codes", "N"],
    ],
    ids=lambda words: " ".join(words[:2]).replace(RECIPE, "recipe"),
)
def test_outside_the_range_a_command_is_one_message_and_writes_nothing(command, tmp_path) -> None:
    put_package(tmp_path / "path", "torch", "version.py", "2.10.0+cu128")
    put_package(tmp_path / "path", "megatron.core", "package_info.py", "0.20.0")
    (tmp_path / "here").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "vqmoe_megatron.cli", *command],
        cwd=tmp_path / "here",
        env={"PYTHONPATH": f"{tmp_path / 'path'}:{ROOT}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: torch is 2.10.0+cu128 and megatron-core is 0.20.0; ")
    assert f"pip install '{TORCH.requirement}' '{MEGATRON_CORE.requirement}'" in line
    assert list((tmp_path / "here").iterdir()) == []


def test_a_missing_package_is_the_same_message(monkeypatch) -> None:
    monkeypatch.setattr(versions.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="torch is not installed and megatron-core is not inst"):
        versions.check_versions()


def test_the_layer_elsewhere_is_only_warned_about(monkeypatch) -> None:
    monkeypatch.setattr(versions, "supported_version", lambda supported: "0.20.0rc0")
    with pytest.warns(UserWarning, match="megatron-core is 0.20.0rc0; vqmoe_megatron"):
        versions.warn_of_versions()


@pytest.fixture
def moe_log():
    versions.forget_moe_log()
    yield
    versions.forget_moe_log()


def test_the_moe_log_takes_values_gives_them_and_begins_anew(moe_log) -> None:
    versions.add_to_moe_log("vq/a", torch.tensor(2.0), 1, 3)
    versions.add_to_moe_log("vq/a", torch.tensor(3.0), 1, 3)
    ((name, values, is_global),) = versions.moe_log_values()
    assert (name, values.tolist(), is_global) == ("vq/a", [5.0, 0.0, 0.0], False)
    versions.clear_moe_log()
    assert [values.tolist() for _, values, _ in versions.moe_log_values()] == [[0.0] * 3]
    versions.forget_moe_log()
    versions.add_to_moe_log("vq/a", torch.tensor(1.0), 5, 5)  # of a model with more layers
    assert [len(values) for _, values, _ in versions.moe_log_values()] == [5]


def test_megatrons_words_for_a_loss_over_data_ranks() -> None:
    for local in ({}, {"reduce_group_has_dp": False}, {"needs_dp_avg": True}):
        assert not versions.is_over_data_ranks(local)
    for over in ({"reduce_group_has_dp": True}, {"needs_dp_avg": False}):
        assert versions.is_over_data_ranks(over)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("import missing_part\n", "missing_part"), ("x = 1\n", "__version__"), ("(\n", "SyntaxError")],
)
def test_a_broken_installation_is_the_same_message_with_its_reason(
    text: str, reason: str, tmp_path, monkeypatch
) -> None:
    package = tmp_path / "megatron" / "core"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "package_info.py").write_text(text)
    spec = importlib.machinery.ModuleSpec("megatron.core", None, is_package=True)
    spec.submodule_search_locations = [str(package)]
    monkeypatch.setattr(versions.importlib.util, "find_spec", lambda name: spec)
    found = versions.supported_version(versions.MEGATRON_CORE)
    assert found.startswith("broken (") and reason in found
    assert not versions.is_supported(versions.MEGATRON_CORE, found)
