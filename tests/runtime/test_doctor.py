"""The doctor: says what is here, finds the broken Apex, imports nothing it should not."""

import importlib
import subprocess
import sys

import pytest
import torch

from vqmoe_megatron.runtime import doctor
from vqmoe_megatron.runtime.versions import MEGATRON_CORE


def findings(environment=None):
    return {part: (path, reason) for part, path, reason in doctor.doctor_report(environment)}


@pytest.fixture
def import_path(tmp_path, monkeypatch):
    """A folder at the front of the import path."""
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    importlib.invalidate_caches()


def test_the_report_covers_every_part_and_tells_the_truth():
    report = findings({})
    expected = {"python", "torch", "process groups", "megatron-core", "transformer engine", "apex"}
    expected |= {"layers", "grouped experts", "triton", "deepspeed", "mlflow", "matplotlib"}
    expected |= {"sentencepiece"}
    expected |= {"rank discovery", "cpu", "memory", "disk"}
    assert expected <= set(report)
    assert report["torch"][0] == torch.__version__
    on_gpu = torch.cuda.is_available()
    assert report["process groups"][0] == ("nccl" if on_gpu else "gloo")
    assert ("device 0" if on_gpu else "device") in report
    assert report["cpu"][0] == f"{torch.get_num_threads()} threads"
    assert all(part and path and reason for part, (path, reason) in report.items())


@pytest.mark.parametrize(
    ("environment", "path", "says"),
    [
        ({}, "single process", "rank 0 of 1"),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, "torchrun", "rank 3 of 8"),
        (
            {
                "SLURM_JOB_ID": "77",
                "SLURM_STEP_ID": "0",
                "SLURM_PROCID": "5",
                "SLURM_NTASKS": "6",
                "SLURM_LOCALID": "2",
                "SLURM_JOB_NODELIST": "n[1-3]",
            },
            "slurm",
            "rank 5 of 6, local rank 2; Slurm job 77, step 0, nodes n[1-3]",
        ),
        ({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "6"}, "single process", "outside any srun step"),
        ({"RANK": "3", "WORLD_SIZE": "8"}, "REFUSED", "LOCAL_RANK"),
    ],
)
def test_rank_discovery_is_told_before_any_rank_starts(environment, path, says):
    part, told, reason = doctor.rank_discovery_finding(environment)
    assert (part, told) == ("rank discovery", path)
    assert says in reason


def test_an_empty_apex_folder_is_found_broken(import_path):
    (import_path / "apex").mkdir()
    part, path, reason = doctor.apex_finding()
    assert (part, path) == ("apex", "BROKEN")
    assert str(import_path / "apex") in reason and "FusedLayerNorm" in reason
    assert findings({})["layers"][0] == "BROKEN"


def test_the_unrelated_apex_package_is_found_broken(import_path):
    (import_path / "apex").mkdir()
    (import_path / "apex" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    _, path, reason = doctor.apex_finding()
    assert path == "BROKEN" and "unrelated" in reason and "amp_C" in reason


def test_apex_with_its_kernels_is_used(import_path):
    for name in ("apex", *doctor.APEX_KERNELS):
        (import_path / name).mkdir()
        (import_path / name / "__init__.py").touch()
    assert doctor.apex_finding()[1] == "fused kernels"
    assert findings({})["layers"][0] == "torch linear, Apex norm"


def test_a_transformer_engine_that_does_not_import_is_not_used(import_path):
    (import_path / "transformer_engine").mkdir()
    (import_path / "transformer_engine" / "__init__.py").touch()
    broken = import_path / "transformer_engine" / "pytorch.py"
    broken.write_text("raise OSError('libcudart.so.12: cannot open')\n")
    path, reason = findings({})["transformer engine"]
    assert path == "not used" and "libcudart" in reason
    sys.modules.pop("transformer_engine", None)


@pytest.mark.parametrize(
    ("version", "path", "says"),
    [
        ("9.9.9", "9.9.9", "OUTSIDE the supported megatron-core>="),
        (None, "MISSING", "not installed; megatron-core>="),
        ("0.16.1", "0.16.1", "supported: megatron-core>="),
    ],
)
def test_a_version_is_judged_by_the_supported_range(version, path, says, monkeypatch):
    monkeypatch.setattr(doctor, "supported_version", lambda supported: version)
    part, found, reason = doctor.version_finding(MEGATRON_CORE)
    assert (part, found) == ("megatron-core", path)
    assert reason.startswith(says)


def test_an_optional_package_that_is_missing_is_named_with_its_installation(monkeypatch):
    assert findings({})["torch"][1].startswith("supported: torch>=")
    monkeypatch.setattr(doctor, "missing", lambda package: f"{package} is not installed (do)")
    report = findings({})
    for package in ("mlflow", "matplotlib", "sentencepiece"):
        path, reason = report[package]
        assert path == "not used" and reason.startswith(f"{package} is not installed (do); ")


def test_printing_imports_neither_megatron_nor_mlflow():
    program = (
        "import sys\n"
        "from vqmoe_megatron.runtime.doctor import print_doctor\n"
        "print_doctor()\n"
        "heavy = {'megatron.core', 'mlflow', 'deepspeed', 'apex'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("vqmoe doctor", "path taken", "megatron-core", "rank discovery"):
        assert word in done.stdout
