"""The doctor: says what is here, names a broken Apex, imports nothing it should not."""

import importlib
import subprocess
import sys

import pytest
import torch
from stand_ins import APEX, run_beside, write

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
    expected |= {"grouped experts", "triton", "deepspeed", "mlflow", "matplotlib", "sentencepiece"}
    expected |= set(PARTS)
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


def test_an_empty_apex_folder_is_not_used_and_named(import_path):
    (import_path / "apex").mkdir()
    part, path, reason = doctor.apex_finding()
    assert (part, path) == ("apex", "not used")
    assert f"{import_path / 'apex'} is a folder without code" in reason
    assert "FusedLayerNorm" in reason


def test_the_unrelated_apex_package_is_not_imported(import_path):
    (import_path / "apex").mkdir()
    (import_path / "apex" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    _, path, reason = doctor.apex_finding()
    assert path == "without kernels" and "unrelated" in reason and "amp_C" in reason


PARTS = ("linear layers", "norms", "fused adam", "gradient accumulation fusion", "fp8 experts")
REPORT = """
from vqmoe_megatron.runtime import doctor, fused_parts
found = [{part: path + ": " + reason for part, path, reason in rows} for rows in (
    doctor.doctor_report({}), fused_parts.part_findings("cuda"))]
"""


def test_every_part_is_told_with_its_place_or_the_reason(tmp_path):
    """Beside stand-ins: the real Apex cannot exist here."""
    (here, on_cuda) = run_beside(None, REPORT)
    for part in PARTS:
        assert here[part].startswith("not used: ") and "is not installed" in here[part]
    assert "fp16 is refused" in here["precision"]
    here, on_cuda = run_beside(write(tmp_path, APEX), REPORT)
    for part, module in (
        ("norms", "fused_layer_norm"),
        ("fused adam", "optimizers"),
        ("gradient accumulation fusion", "fused_weight_gradient_mlp_cuda"),
    ):
        assert on_cuda[part].startswith("used: Apex's") and f"{module}" in on_cuda[part]
        assert str(tmp_path) in on_cuda[part]
        assert here[part].startswith("not used: ") and "need a CUDA device" in here[part]
    assert on_cuda["linear layers"].startswith("not used: transformer_engine is not installed")
    assert "amp_C and fused_layer_norm_cuda found" in here["apex"]


def test_an_adam_that_would_crash_megatron_is_told(tmp_path):
    broken = {
        **APEX,
        "amp_C.py": "",
        "apex/optimizers/__init__.py": "class FusedAdam: ...\nclass FusedSGD: ...\n",
    }
    here, _ = run_beside(write(tmp_path, broken), REPORT)
    assert (
        here["fused adam"].startswith("REFUSED: ")
        and "has no multi_tensor_adam" in here["fused adam"]
    )


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
